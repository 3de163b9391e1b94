"""Spoken scenes: pure in (seed, index), true to their truth, in the published layout, resumable."""

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from feature_extract.sources import scene_captions, spoken_scenes
from feature_extract.sources.scene_drawing import SIDE
from feature_extract.sources.scene_speech import VOICES, Voice, speak
from feature_extract.sources.spoken_scenes import CLASSES, ScenesConfig, draw, scenes, words
from opt.config import UserError


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of every published file (not the journals, not the noted configuration)."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and path.name[0] != "." and path.name != "scenes.json"
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    scenes(ScenesConfig(out=out, train=12, val=2, test=3, seed=5, workers=2))
    return out


def test_files_do_not_depend_on_workers_or_on_a_stop(written: Path, tmp_path: Path):
    scenes(ScenesConfig(out=tmp_path, train=5, val=2, test=0, seed=5, workers=1))
    scenes(ScenesConfig(out=tmp_path, train=12, val=2, test=3, seed=5, workers=1))
    assert fingerprints(tmp_path) == fingerprints(written)


def test_layout_is_the_published_one(written: Path):
    lines = [json.loads(line) for line in (written / "train_localized_narratives.jsonl").read_text().splitlines()]
    truths = [json.loads(line) for line in (written / "train_scenes.jsonl").read_text().splitlines()]
    assert [truth["image_id"] for truth in truths] == list(dict.fromkeys(line["image_id"] for line in lines))
    for line in lines:
        assert set(line) == {
            "dataset_id", "image_id", "annotator_id", "caption", "timed_caption", "traces", "voice_recording",
        }  # fmt: skip
        assert Image.open(written / "images" / f"{line['image_id']}.jpg").size == (SIDE, SIDE)
        recording = soundfile.info(written / "voice" / line["voice_recording"])
        assert (recording.samplerate, recording.channels) == (16_000, 1)
        timed = line["timed_caption"]
        assert [word["utterance"] for word in timed] == line["caption"].split()
        edges = [edge for word in timed for edge in (word["start_time"], word["end_time"])]
        assert edges == sorted(edges)
        assert edges[-1] == pytest.approx(recording.duration, abs=0.001)


def test_a_lost_recording_is_made_again(written: Path, tmp_path: Path):
    config = ScenesConfig(out=tmp_path, train=2, val=0, test=0, seed=5, workers=1)
    scenes(config)
    before = fingerprints(tmp_path)
    next((tmp_path / "voice").iterdir()).unlink()
    scenes(config)
    assert fingerprints(tmp_path) == before


def test_another_seed_in_the_same_folder_is_refused(written: Path):
    with pytest.raises(UserError, match="seed 5, not 6"):
        scenes(ScenesConfig(out=written, train=1, val=0, test=0, seed=6))


def test_dry_run_writes_nothing(tmp_path: Path):
    scenes(ScenesConfig(out=tmp_path / "new", dry_run=True))
    assert not (tmp_path / "new").exists()


def test_captions_are_true_and_tell_scenes_apart():
    drawn = [draw(3, index) for index in range(1000)]
    captions = [telling.caption for scene in drawn for telling in scene.tellings]
    texts = [caption.text for caption in captions]
    assert {word for text in texts for word in text.split()} <= set(words())
    assert 80 <= len(words()) <= 110
    assert len(texts) - len(set(texts)) < 20
    assert all(8 <= len(text.split()) <= 18 for text in texts)
    assert 0.1 < np.mean([not all(caption.mentioned) for caption in captions]) < 0.3
    for scene in drawn:
        assert 1 <= len(scene.objects) <= 4
        assert set(scene.labels) <= set(CLASSES)
        assert all(thing.hidden <= 0.6 for thing in scene.objects)
        for telling in scene.tellings:
            for thing, mentioned in zip(scene.objects, telling.caption.mentioned, strict=True):
                named = f" {thing.color} {thing.shape}" in telling.caption.text
                assert named == mentioned, (telling.caption.text, thing.label)


def test_relations_hold_in_the_picture():
    """ "A left of B" with two single objects: A's middle is left of B's."""
    checked = 0
    for index in range(300):
        scene = draw(4, index)
        if len(scene.objects) != 2 or scene.objects[0].unit == scene.objects[1].unit:
            continue
        text = scene.tellings[0].caption.text
        for word, sign, axis in (("left of", 1, "x"), ("right of", -1, "x"), ("above", 1, "y"), ("below", -1, "y")):
            if f" {word} " in text:
                first, second = sorted(scene.objects, key=lambda thing: text.index(thing.label))
                assert sign * (getattr(second, axis) - getattr(first, axis)) > 0, text
                checked += 1
    assert checked > 20


def test_boxes_hold_the_painted_object():
    """Painting the same scene with and without its nearest object changes pixels within that object's box only."""
    scene = next(scene for scene in (draw(6, index) for index in range(50)) if scene.objects[-1].hidden == 0)
    with_it = np.asarray(scene.picture(), int)
    paint_all_but_last = type(scene)(scene.seed, scene.index, scene.ground, scene.objects[:-1], scene.tellings)
    changed = np.abs(with_it - np.asarray(paint_all_but_last.picture(), int)).sum(2) > 0
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(found - np.array(scene.objects[-1].box) * SIDE).max() <= 2.5


@pytest.mark.parametrize("number", range(len(VOICES)))
def test_every_voice_says_the_same_twice(number: int):
    """espeak-ng's variants with breath do not."""
    voice = Voice(number, words_a_minute=200, pitch=50, noise_db=30)
    spoken = [speak("a tiny green cross in the snow", voice, np.random.default_rng(0)).samples for _ in range(3)]
    assert np.array_equal(spoken[0], spoken[1])
    assert np.array_equal(spoken[0], spoken[2])


def test_drowned_words_are_loud():
    drowned = [
        (speech, word) for speech in (draw(1, i).tellings[0].speech() for i in range(8)) for word in speech.drowned
    ]
    assert drowned
    for speech, word in drowned:
        begin, end = int(speech.begins[word] * 16_000), int(speech.ends[word] * 16_000)
        assert speech.samples[begin:end].std() > 1.2 * np.delete(speech.samples, slice(begin, end)).std()


def test_words_know_every_phrase():
    assert {"two", "circles", "crosses", "left", "meadow", "striped", "huge"} <= set(words())
    assert scene_captions.words() == tuple(sorted(set(words())))


@pytest.mark.parametrize("noise", [b"3\n", b"[]\n", b'{"index": 0}\n', b"\xff\xfe\n", b'{"index": 1, "sce'])
def test_a_damaged_journal_costs_only_the_scenes_it_lost(written: Path, tmp_path: Path, noise: bytes):
    out = tmp_path / "out"
    shutil.copytree(written, out)
    journal = out / ".test_journal.jsonl"
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(noise + b"".join(rest))
    scenes(ScenesConfig(out=out, train=12, val=2, test=3, seed=5, workers=1))
    assert fingerprints(out) == fingerprints(written)


def test_a_worker_that_is_killed_is_a_sentence():
    with pytest.raises(UserError, match="run the same command again"):
        list(spoken_scenes._work(partial(os._exit), [1, 2, 3], 2))
