"""Spoken scenes, the built-in corpus: unlimited triples of picture, caption and speech, pure in (seed, index).

    draw(seed, index) -> Scene --write--> the published Localized Narratives layout
        <split>_localized_narratives.jsonl   one line a narration: caption, times of its words, voice_recording, ...
        images/<image_id>.jpg                128 x 128
        voice/<voice_recording>              16 kHz mono FLAC
        <split>_scenes.jsonl                 the truth, for evaluation only: labels, objects, ground, drowned words
        <split>_questions.jsonl              questions about the pictures with their answers (scene_questions.py)
        <split>_statements.jsonl             true and false statements about two pictures (scene_statements.py)

No modality knows everything: captions leave objects out, objects are small or half hidden, words are drowned in
noise. Splits draw from index ranges that never meet, so a larger training set leaves the test set as it is.
"""

from __future__ import annotations

import io
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from feature_extract.sources import (
    scene_captions,
    scene_drawing,
    scene_grounds,
    scene_questions,
    scene_speech,
    scene_statements,
)
from feature_extract.sources.scene_captions import Caption, words
from feature_extract.sources.scene_drawing import CLASSES, Thing
from feature_extract.sources.scene_speech import Speech, Voice
from opt.config import UserError, load, save
from opt.files import open_atomic, write_atomic
from opt.progress import progress

__all__ = ["CLASSES", "Scene", "ScenesConfig", "Telling", "draw", "scenes", "words"]

SPLITS = {"train": 0, "val": 10_000_000, "test": 20_000_000}
"""The first index of each split."""

TWO_TELLINGS_SHARE = 0.05
_LAYOUT, _PAINT, _TELLING, _NOISE = range(4)


@dataclass(frozen=True)
class Telling:
    """One caption of a scene and who reads it."""

    caption: Caption
    voice: Voice
    key: tuple[int, ...]

    def speech(self) -> Speech:
        """The caption spoken, 16 kHz; takes about 25 ms, most of it a fresh process of espeak-ng."""
        return scene_speech.speak(self.caption.text, self.voice, np.random.default_rng((*self.key, _NOISE)))


@dataclass(frozen=True)
class Scene:
    """One picture and its one or two tellings; objects far to near."""

    seed: int
    index: int
    ground: str
    objects: tuple[Thing, ...]
    tellings: tuple[Telling, ...]

    @property
    def image_id(self) -> str:
        """Names the picture in every file."""
        return f"s{self.seed}-{self.index:08d}"

    @property
    def labels(self) -> list[str]:
        """What is in the picture: sorted distinct names out of `CLASSES`."""
        return sorted({thing.label for thing in self.objects})

    def picture(self) -> Image.Image:
        """The picture, RGB 128 x 128."""
        return scene_drawing.paint(self.objects, self.ground, np.random.default_rng((self.seed, self.index, _PAINT)))


def draw(seed: int, index: int) -> Scene:
    """Scene number `index` of `seed`, without painting or speaking it yet."""
    rng = np.random.default_rng((seed, index, _LAYOUT))
    ground = str(rng.choice(scene_grounds.GROUNDS))
    objects = scene_drawing.lay_out(rng)
    count = 2 if rng.random() < TWO_TELLINGS_SHARE else 1
    return Scene(
        seed,
        index,
        ground,
        objects,
        tuple(_tell((seed, index, _TELLING, number), objects, ground) for number in range(count)),
    )


def _tell(key: tuple[int, ...], objects: tuple[Thing, ...], ground: str) -> Telling:
    rng = np.random.default_rng(key)
    return Telling(scene_captions.compose(objects, ground, rng), scene_speech.draw_voice(rng), key)


@dataclass
class ScenesConfig:
    """Where the scenes go and how many there are."""

    out: Path
    """Folder to write; made when absent."""
    train: int = 4000
    """Scenes of the training split."""
    val: int = 100
    """Scenes of the validation split."""
    test: int = 200
    """Scenes of the test split."""
    seed: int = 1
    """Another seed gives other scenes. The embedded networks were trained on seeds from 20000 on."""
    workers: int = 2
    """Processes that draw and speak; the files do not depend on their number."""
    dry_run: bool = False
    """Only say what would be written."""


def scenes(config: ScenesConfig) -> None:
    """Write spoken scenes in the Localized Narratives layout.

    Run again after a stop: finished scenes are kept, and a folder from before there were questions or statements gets
    them. Example:

        python -m opt scenes --out runs/scenes --train 4000 --val 100 --test 200 --seed 1
    """
    sizes = {"train": config.train, "val": config.val, "test": config.test}
    if wrong := [split for split, size in sizes.items() if not 0 <= size <= 10_000_000]:
        raise UserError(f"--{wrong[0]} {sizes[wrong[0]]}: a split holds 0 to 10,000,000 scenes")
    if config.workers < 1 or config.seed < 0:
        raise UserError(f"--workers {config.workers} --seed {config.seed}: workers is at least 1, seed at least 0")
    if config.dry_run:
        print(f"would write {sum(sizes.values())} scenes of seed {config.seed} to {config.out}: {sizes}")
        return
    _claim(config)
    for split, size in sizes.items():
        _write_split(config, split, size)


def _claim(config: ScenesConfig) -> None:
    """Make the folder and note the seed in it. Raises UserError when it holds scenes of another seed."""
    for folder in ("images", "voice"):
        (config.out / folder).mkdir(parents=True, exist_ok=True)
    noted = config.out / "scenes.json"
    if noted.exists() and (seed := load(ScenesConfig, noted).seed) != config.seed:
        raise UserError(
            f"{config.out} holds scenes of seed {seed}, not {config.seed}: choose another --out or that seed"
        )
    save(config, noted)


def _write_split(config: ScenesConfig, split: str, size: int) -> None:
    """Media first, a line a finished scene in a journal, the JSONL files last. A second run goes by the journal."""
    journal = config.out / f".{split}_journal.jsonl"
    lines = {line["index"]: line for line in _journal_lines(journal) if _media_exist(config.out, line)}
    wanted = range(SPLITS[split], SPLITS[split] + size)
    missing = [index for index in wanted if index not in lines]
    with (
        journal.open("a", encoding="utf-8") as file,
        progress(split, total=size, done=size - len(missing), unit="scenes") as bar,
    ):
        for line in _work(partial(_write_scene, config.out, config.seed, split), missing, config.workers):
            lines[line["index"]] = line
            file.write(json.dumps(line) + "\n")
            file.flush()
            bar.advance()
    ordered = [lines[index] for index in wanted]
    _write_lines(config.out / f"{split}_scenes.jsonl", [line["scene"] for line in ordered])
    narratives = [narrative for line in ordered for narrative in line["narratives"]]
    _write_lines(config.out / f"{split}_localized_narratives.jsonl", narratives)
    questions = [question for line in ordered for question in scene_questions.ask(line["scene"])]
    _write_lines(config.out / f"{split}_questions.jsonl", questions)
    statements = scene_statements.state([line["scene"] for line in ordered])
    _write_lines(config.out / f"{split}_statements.jsonl", statements)
    sentence, *picture = scene_statements.blind(statements)
    counts = Counter(narrative["caption"] for narrative in narratives)
    shared = sum(count for count in counts.values() if count > 1)
    print(
        f"{split}: {size} scenes, {len(narratives)} narrations; "
        f"{shared} share their caption with another ({shared / max(1, len(narratives)):.1%}); "
        f"{len(questions)} questions, a blind guess is right in {scene_questions.blind(questions):.1%}; "
        f"{len(statements)} statements, a blind guess is right in {sentence:.1%}, "
        f"one that sees a single picture in {max(picture):.1%} at most"
    )


def _journal_lines(journal: Path) -> Iterator[dict[str, Any]]:
    """The journal's whole lines; the last one may be cut off by a kill, and a line written after it with it."""
    for text in journal.read_bytes().splitlines() if journal.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"index", "scene", "narratives"} <= set(line):
            yield line


def _media_exist(out: Path, line: dict[str, Any]) -> bool:
    picture = out / "images" / f"{line['scene']['image_id']}.jpg"
    return picture.exists() and all((out / "voice" / told["voice_recording"]).exists() for told in line["narratives"])


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    with open_atomic(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _work(task: partial[dict[str, Any]], indices: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """The task's answers in order, from `workers` processes (from this one when it is only one)."""
    if workers == 1:
        yield from map(task, indices)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(task, indices, chunksize=8)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process ended unexpectedly, most often because memory ran out: run the same command again to "
                "go on, with --workers 1 if it happens again"
            ) from error


def _write_scene(out: Path, seed: int, split: str, index: int) -> dict[str, Any]:
    """Write one scene's picture and recordings; answer its lines of the JSONL files. Runs in worker processes."""
    import soundfile

    scene = draw(seed, index)
    encoded = io.BytesIO()
    scene.picture().save(encoded, "JPEG", quality=92)
    write_atomic(out / "images" / f"{scene.image_id}.jpg", encoded.getvalue())
    narratives, drowned = [], []
    for number, telling in enumerate(scene.tellings):
        speech = telling.speech()
        recording = f"{scene.image_id}-{number}.flac"
        sound = io.BytesIO()
        soundfile.write(sound, speech.samples, scene_speech.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        write_atomic(out / "voice" / recording, sound.getvalue())
        narratives.append(_narrative(scene, telling, speech, split, recording))
        drowned.append([telling.caption.text.split()[word] for word in speech.drowned])
    return {"index": index, "scene": _truth(scene, drowned), "narratives": narratives}


def _narrative(scene: Scene, telling: Telling, speech: Speech, split: str, recording: str) -> dict[str, Any]:
    """One line as Localized Narratives publishes them; the speaker's mouse left no traces here."""
    spoken = zip(telling.caption.sentence.split(), speech.begins, speech.ends, strict=True)
    return {
        "dataset_id": f"spoken_scenes_{split}",
        "image_id": scene.image_id,
        "annotator_id": telling.voice.number,
        "caption": telling.caption.sentence,
        "timed_caption": [
            {"utterance": word, "start_time": round(begin, 3), "end_time": round(end, 3)} for word, begin, end in spoken
        ],
        "traces": [],
        "voice_recording": recording,
    }


def _truth(scene: Scene, drowned: list[list[str]]) -> dict[str, Any]:
    """The sidecar's line. `mentioned` and `drowned_words` count all tellings of the picture together."""
    objects = [
        {
            "shape": thing.shape, "color": thing.color, "size": thing.size, "texture": thing.texture,
            "box": list(thing.box), "hidden": thing.hidden,
            "mentioned": any(telling.caption.mentioned[number] for telling in scene.tellings),
        }
        for number, thing in enumerate(scene.objects)
    ]  # fmt: skip
    words_lost = [word for words_of_one in drowned for word in words_of_one]
    return {
        "image_id": scene.image_id,
        "labels": scene.labels,
        "objects": objects,
        "ground": scene.ground,
        "drowned_words": words_lost,
    }
