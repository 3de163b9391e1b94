"""Every evaluation on real photos, narrations and read speech: does all of it run, and what does it say?

    python benchmarks/real_sets.py --data DATA --model runs/flickr/run/model

    DATA/flickr-speech, narrations, coco-cc, librispeech --opt extract--> shards --every opt eval--> results --> reports
    captions (of flickr those that the shards do not hold) --> labels of photos, questions, statements about two of them

The sets are those of the tests (their README says what they are). None comes with labels or questions, so these are
made from captions: a label is one of the forty nouns that most photos have in two captions or more; a question asks for
one; a statement says that both photos show one. They exercise the evaluations and quote nothing.
Prints one JSON line: seconds and figures by set and evaluation; reports are OUT/SET/report.html.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from eval.naming import LabelFinder
from opt import cli
from opt.checkpoint import from_pretrained
from opt.files import write_atomic

LABELS, AGREEING = 40, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds flickr-speech, narrations, ...")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--answering", type=Path, help="a model that opt finetune vqa-words has tuned")
    parser.add_argument("--judging", type=Path, help="a model that opt finetune nlvr2 has tuned")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    given = parser.parse_args()
    rate = from_pretrained(given.model).facts.frame_rate
    shards = {name: _shards(given, name, words, rate) for name, words in _sources(given.data).items()}
    truth = _truth(given.data, given.out)
    done = {
        name: [_evaluated(given, name, verb, folder, options) for verb, options in _verbs(given, name, shards, truth)]
        for name, folder in shards.items()
        if name != "flickr-train"
    }
    for name in done:
        _verb("report", given.out / name)
    line = json.dumps({name: dict(entries) for name, entries in done.items()})
    write_atomic(given.out / "real_sets.json", (line + "\n").encode())
    print(line)


def _sources(data: Path) -> dict[str, tuple[object, ...]]:
    """How each set is extracted."""
    return {
        "flickr-train": ("localized_narratives", data / "flickr-speech", "--split", "train"),
        "flickr": ("localized_narratives", data / "flickr-speech", "--split", "test"),
        "narrations": ("localized_narratives", data / "narrations", "--split", "train"),
        "coco": ("coco_captions", data / "coco-cc"),
        "librispeech": ("transcripts", data / "librispeech"),
    }


def _shards(given: argparse.Namespace, name: str, source: tuple[object, ...], rate: float) -> Path:
    """Features of one set by the extractors of the model; what is made is not made again."""
    folder = given.out / "shards" / name
    _verb("extract", *source, "--out", folder, "--workers", 2, "--frames-per-second", rate)
    return folder


def _verbs(
    given: argparse.Namespace, name: str, shards: dict[str, Path], truth: dict[str, Path]
) -> list[tuple[str, list[object]]]:
    """The evaluations that a set has something for, with their options."""
    labels = truth.get(name)
    verbs: list[tuple[str, list[object]]] = []
    if name != "librispeech":
        verbs += [("retrieval", []), ("caption", ["--labels", labels] if labels else []), ("text-to-image", [])]
    if name != "coco":
        verbs.append(("transcribe", []))
    if name == "flickr":
        verbs.append(("classify", ["--train-shards", shards["flickr-train"], "--labels", labels]))
        verbs += [("vqa", ["--questions", truth["questions"]])] if given.answering else []
        verbs += [("nlvr2", ["--statements", truth["statements"]])] if given.judging else []
    return verbs


def _evaluated(
    given: argparse.Namespace, name: str, verb: str, folder: Path, options: list[object]
) -> tuple[str, dict[str, Any]]:
    """One evaluation as a user would type it."""
    results, began = given.out / name / "results", time.perf_counter()
    model = {"vqa": given.answering, "nlvr2": given.judging}.get(verb, given.model)
    _verb("eval", verb, model, folder, "--out", results, *options)
    content = json.loads((results / f"{verb.replace('-', '_')}.json").read_bytes())
    figures = {metric["name"]: round(metric["value"], 4) for metric in content["metrics"]}
    return verb, {"seconds": round(time.perf_counter() - began, 1), **figures}


def _verb(*words: object) -> None:
    """One verb. Ends the program when it fails: the verb has said why."""
    if status := cli.main([str(word) for word in words]):
        raise SystemExit(status)


def _truth(data: Path, out: Path) -> dict[str, Path]:
    """Files of labels by set, of questions and of statements."""
    said: dict[str, dict[str, list[str]]] = {"flickr": defaultdict(list), "coco": defaultdict(list)}
    with (data / "flickr-speech" / "captions.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            said["flickr"][row["image"].removesuffix(".jpg")].append(row["caption"])
    said["flickr"] = {key: captions[1:] for key, captions in said["flickr"].items()}  # the shards hold the first
    for entry in json.loads((data / "coco-cc" / "captions.json").read_bytes())["annotations"]:
        said["coco"][str(entry["image_id"])].append(entry["caption"])
    nouns = (data / "vocab" / "visual-genome-objects.txt").read_text(encoding="utf-8").splitlines()
    finder = LabelFinder(noun.split(",")[0] for noun in nouns)
    out.mkdir(parents=True, exist_ok=True)
    files, labels = {}, {name: _agreed(captions, finder) for name, captions in said.items()}
    for name, found in labels.items():
        lines = [{"image_id": key, "labels": sorted(names)} for key, names in found.items()]
        files[name] = _written(out / f"{name}_labels.jsonl", lines)
    questions, statements = _asked(labels["flickr"])
    files["questions"] = _written(out / "questions.jsonl", questions)
    files["statements"] = _written(out / "statements.jsonl", statements)
    return files


def _agreed(captions: dict[str, list[str]], finder: LabelFinder) -> dict[str, set[str]]:
    """Labels of each picture: what AGREEING of its captions name, of the LABELS that most pictures have."""
    counts = {key: Counter(name for text in some for name in finder.find(text)) for key, some in captions.items()}
    agreed = {key: {name for name, times in count.items() if times >= AGREEING} for key, count in counts.items()}
    common = {name for name, _ in Counter(name for names in agreed.values() for name in names).most_common(LABELS)}
    return {key: names & common for key, names in agreed.items()}


def _asked(labels: dict[str, set[str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A question for each picture, yes as often as no, and a statement for each picture and the next one."""
    random, names, keys = np.random.default_rng(0), sorted(set.union(*labels.values())), sorted(labels)
    questions, statements = [], []
    for place, key in enumerate(keys):
        other = keys[place - 1]
        there, absent = sorted(labels[key]), sorted(set(names) - labels[key])
        some = there if there and random.random() < 0.5 else absent
        name = some[random.integers(len(some))]
        questions.append({"image_id": key, "question": f"is there a {name}?", "answers": [_word(name in labels[key])]})
        shared = sorted(labels[key] & labels[other])
        name = shared[0] if shared and random.random() < 0.7 else name
        true = "true" if name in labels[key] & labels[other] else "false"
        statements.append({"image_ids": [key, other], "question": f"both pictures show a {name}.", "answers": [true]})
    return questions, statements


def _word(true: bool) -> str:
    return "yes" if true else "no"


def _written(path: Path, lines: list[dict[str, Any]]) -> Path:
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return path


if __name__ == "__main__":
    main()
