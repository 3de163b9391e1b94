"""METEOR 1.5 and SPICE by their authors' own Java programs; where one cannot run, a sentence that says why.

    words of candidates and references --java meteor-1.5.jar / spice-1.0.jar--> a score of each picture

Neither has a second implementation that gives the same numbers, so neither is imitated here. The programs come with the
package pycocoevalcap; SPICE also needs two files of Stanford CoreNLP 3.6.0, which are never downloaded unasked.
Both take several sets of candidates for the same pictures, so that a program starts once. Shape legend: N pictures.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.captions.coco import Words
from opt.config import UserError, extra

JAVA = ("java", "-Dfile.encoding=UTF-8")
METEOR_JAR = "meteor/meteor-1.5.jar"
METEOR_PARAPHRASES = "meteor/data/paraphrase-en.gz"
SPICE_JAR = "spice/spice-1.0.jar"
CORENLP_JARS = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")
SECONDS_TO_START = 600
SECONDS_A_PICTURE = 5
"""A program that takes longer is ended."""


def meteor(sets: Sequence[Sequence[Words]], references: Sequence[Sequence[Words]]) -> list[tuple[float, np.ndarray]]:
    """METEOR 1.5 (English, -norm) of each set of candidates, which is no mean, and of its pictures, (N,).

    Raises UserError when the program is missing, fails or takes too long.
    """
    jar = _program("METEOR", METEOR_JAR, METEOR_PARAPHRASES)
    command = [*JAVA, "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        )
        limit = threading.Timer(_seconds(len(sets) * len(references)), process.kill)
        limit.start()
        try:
            return [_meteor_of(process, candidates, references) for candidates in sets]
        except (OSError, ValueError) as error:
            process.kill()
            process.wait()
            errors.seek(0)
            raise _failure("METEOR", errors.read().decode(errors="replace")) from error
        finally:
            limit.cancel()
            process.kill()
            process.communicate()


def _meteor_of(
    process: subprocess.Popen[str], candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> tuple[float, np.ndarray]:
    """Ask for the counts of each picture, then for the scores of all counts; a line asked, a line answered."""
    assert process.stdin and process.stdout
    counts = []
    for words, others in zip(candidates, references, strict=True):
        fields = [" ".join(text).replace("|||", "") for text in (*others, words)]
        print("SCORE", *fields, sep=" ||| ", file=process.stdin, flush=True)
        counts.append(process.stdout.readline().strip())
    print("EVAL", *counts, sep=" ||| ", file=process.stdin, flush=True)
    scores = [float(process.stdout.readline()) for _ in counts]
    return float(process.stdout.readline()), np.array(scores)


def spice(sets: Sequence[Sequence[Words]], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """SPICE (Anderson et al. 2016) of each picture of each set, (sets, N): F of scene graphs.

    Raises UserError when the program or its models are missing, it fails or takes too long.
    """
    jar = _program("SPICE", SPICE_JAR, *CORENLP_JARS)
    pairs = [pair for candidates in sets for pair in zip(candidates, references, strict=True)]
    asked = [
        {"image_id": number, "test": " ".join(words), "refs": [" ".join(other) for other in others]}
        for number, (words, others) in enumerate(pairs)
    ]
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder, "captions.json"), Path(folder, "scores.json")
        given.write_text(json.dumps(asked))
        command = [*JAVA, "-Xmx8G", "-jar", jar.name, str(given), "-out", str(answer), "-silent"]
        try:
            subprocess.run(
                command, cwd=jar.parent, check=True, capture_output=True, encoding="utf-8", errors="replace",
                timeout=_seconds(len(asked)),
            )  # fmt: skip
            scores = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in json.loads(answer.read_bytes())}
            found = np.array([float(scores[number]) for number in range(len(asked))])
            if not np.isfinite(found).all():
                raise ValueError("a score is no number")
            return found.reshape(len(sets), -1)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"SPICE took longer than {error.timeout:.0f} s and was ended") from error
        except subprocess.CalledProcessError as error:
            raise _failure("SPICE", error.stderr) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"SPICE wrote no scores that can be read: {error!r}") from error


def _program(name: str, *needed: str) -> Path:
    """The jar that comes first in `needed`. Raises UserError when Java or any of the files is missing."""
    if shutil.which("java") is None:
        raise UserError(f"{name} runs in Java and there is no `java` here: install a Java runtime, version 8 or newer")
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{name}'s Java program is in pycocoevalcap, which is not here: {extra('eval')}")
    folder = Path(next(iter(found.submodule_search_locations)))
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing and set(missing) <= set(CORENLP_JARS):
        names = " and ".join(Path(file).name for file in missing)
        raise UserError(
            f"{name} needs {names} in {(folder / missing[0]).parent}: take them from Stanford's archive "
            "stanford-corenlp-full-2015-12-09.zip"
        )
    if missing:
        raise UserError(f"{name} needs {', '.join(missing)} in {folder}: pip install --force-reinstall pycocoevalcap")
    return folder / needed[0]


def _seconds(pictures: int) -> float:
    return SECONDS_TO_START + SECONDS_A_PICTURE * pictures


def _failure(name: str, errors: str) -> UserError:
    said = [line.strip() for line in errors.splitlines() if line.strip()]
    return UserError(f"{name}'s Java program failed or was ended: {' / '.join(said[:3]) or 'it said nothing'}")
