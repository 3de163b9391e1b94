"""`opt generate` on files of one's own: the answers are those that the same media give in shards."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from fixtures import FACTS, tokenizer
from PIL import Image
from workshop import COUNT, make_workshop

from opt.checkpoint import from_pretrained, save_pretrained
from opt.cli import main
from opt.data.shards import ShardReader
from opt.systems.system import Sampling, build, load


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("generate"))


def run(workshop: Path, *words: object) -> int:
    return main(["generate", str(workshop / "model"), *map(str, words)])


GIVEN = [("image",), ("audio",), ("image", "audio")]


@pytest.mark.parametrize("given", GIVEN)
def test_files_give_what_their_shards_give(workshop, given, capsys) -> None:
    """Several at once, in their order, by beam search."""
    pictures, recordings = (workshop / "media/images").glob("*.jpg"), (workshop / "media/voice").iterdir()
    media = {"image": sorted(pictures), "audio": sorted(recordings)}
    options = [word for name in given for word in (f"--{name}", *media[name])]
    assert run(workshop, *options, "--beams", 3, "--limit", 9) == 0
    said = capsys.readouterr()
    reader, system = ShardReader(workshop / "shards"), from_pretrained(workshop / "model")
    samples = [reader.sample(number) for number in range(COUNT)]
    wanted = system.generate_text(samples, given, Sampling(beams=3, limit=9))
    names = [" + ".join(str(media[name][number]) for name in given) for number in range(COUNT)]
    assert said.out.splitlines() == [f"{name}: {text}" for name, text in zip(names, wanted, strict=True)]
    assert len(set(wanted)) > 1 and all(wanted)
    assert "embedded tiny networks" in said.err


def test_a_sentence_and_a_recording_are_drawn(workshop, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "lines.jsonl"
    texts = ["red circle", "blue star", "green square"]
    drawn = tmp_path / "drawn" / "scene.png"
    assert run(workshop, "--text", *texts, "--draw", drawn, "--seed", 5, "--out", out) == 0
    paths = [drawn.with_name(f"scene-{number}.png") for number in (1, 2, 3)]
    assert [Image.open(path).size for path in paths] == [(64, 64)] * 3
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [{"text": text, "drawn": str(path)} for text, path in zip(texts, paths, strict=True)]
    pixels = [path.read_bytes() for path in paths]
    assert run(workshop, "--text", texts[1], "--draw", tmp_path / "one.png", "--seed", 5) == 0
    assert (tmp_path / "one.png").read_bytes() == pixels[1], "the seed repeats it, alone as among others"
    assert run(workshop, "--text", texts[1], "--draw", tmp_path / "one.png", "--seed", 6) == 0
    assert (tmp_path / "one.png").read_bytes() != pixels[1]
    recording = workshop / "media/voice/r0.wav"
    assert run(workshop, "--audio", recording, "--draw", tmp_path / "heard.PNG") == 0
    assert run(workshop, "--audio", recording, "--text", texts[0], "--draw", tmp_path / "both.png") == 0
    assert f'"{texts[0]}" + {recording}: {tmp_path / "both.png"}' in capsys.readouterr().out
    assert run(workshop, "--audio", tmp_path / "absent.wav", recording, "--draw", tmp_path / "some.png") == 2
    assert {path.name for path in tmp_path.glob("some*")} == {"some-2.png"}, "numbered as the inputs are"


def test_files_that_cannot_be_used_are_named_and_the_others_answered(workshop, tmp_path, capsys) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    good = workshop / "media/images/p1.png"
    given = [tmp_path / "broken.png", good, tmp_path / "absent.png"]
    assert run(workshop, "--image", *given, "--out", tmp_path / "lines.jsonl") == 2
    said = capsys.readouterr()
    assert said.out.startswith(f"{good}: ") and said.out.count("\n") == 1
    error = said.err.splitlines()[-1]
    assert "2 of 3 could not be used" in error and "broken.png" in error and "missing file" in error
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [sorted(line) for line in lines] == [["error", "image"], ["image", "written"], ["error", "image"]]
    (tmp_path / "short.wav").write_bytes(b"RIFF")
    assert run(workshop, "--image", good, "--audio", tmp_path / "short.wav") == 2
    assert "broken recording" in capsys.readouterr().err.splitlines()[-1], "never a caption in place of a transcript"


@pytest.mark.parametrize(("words", "said"), [
    ([], "--image or --audio"),
    (["--text", "red circle"], "--draw FILE.png"),
    (["--image", "a.png", "b.png", "--audio", "a.wav"], "2 --image and 1 --audio"),
    (["--image", "a.png", "--draw", "b.png"], "leave --image out"),
    (["--text", "red", "--draw", "red.gif"], "end in .png"),
    (["--text", " ", "--draw", "red.png"], "empty text"),
    (["--text", "not UTF-8: \udcff", "--draw", "red.png"], "not UTF-8"),
    (["--image", "a.png", "--beams", "0"], "beams 0 must be at least 1"),
    (["--image", "a.png", "--batch", "0"], "--batch 0"),
])  # fmt: skip
def test_what_makes_no_sense_is_said_in_one_line(workshop, words, said, capsys) -> None:
    assert run(workshop, *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_name_that_is_not_utf_8_is_written_with_its_bytes(workshop, tmp_path, capfdbinary) -> None:
    named = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    named.write_bytes((workshop / "media/images/p1.jpg").read_bytes())
    assert run(workshop, "--image", named, "--out", tmp_path / "lines.jsonl") == 0
    assert b"caf\\udce9.jpg: " in capfdbinary.readouterr().out
    assert json.loads((tmp_path / "lines.jsonl").read_text())["image"] == str(named)


@pytest.mark.parametrize(("words", "said"), [
    (["--image", "own.jpg", "--out", "own.jpg"], "own.jpg is an input"),
    (["--image", "own.jpg", "--out", "folder/../own.jpg"], "own.jpg is an input"),
    (["--image", "own.jpg", "--out", "folder"], "folder is a folder"),
    (["--text", "red", "--draw", "folder.png"], "folder.png is a folder"),
    (["--text", "red", "--draw", "a.png", "--out", "a.png"], "name two files"),
    (["--text", "red", "blue", "--draw", "a.png", "--out", "a-2.png"], "name two files"),
])  # fmt: skip
def test_nothing_of_the_users_is_written_over(workshop, tmp_path, words, said, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "folder.png"):
        (tmp_path / name).mkdir()
    picture = (workshop / "media/images/p1.jpg").read_bytes()
    (tmp_path / "own.jpg").write_bytes(picture)
    assert run(workshop, *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (tmp_path / "own.jpg").read_bytes() == picture and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(("facts", "words", "said"), [
    ({"region_width": 0}, ["--image", "a.png"], "trained without image"),
    ({"speech_width": 0}, ["--audio", "a.wav"], "trained without audio"),
    ({"codebook": 0}, ["--text", "red", "--draw", "a.png"], "trained without image codes"),
    ({}, ["--image", "a.png"], "does not say which extractor"),
    ({"extractors": {"regions": {"backend": "torchvision_detector", "weights": "gone:gone.pt", "weights_sha256": "0",
                                 "settings": {"max_regions": 3, "score_threshold": 0.2}}}},
     ["--image", "a.png"], "gone"),
])  # fmt: skip
def test_what_the_model_never_saw_or_weights_that_are_gone(tmp_path, facts, words, said, capsys) -> None:
    save_pretrained(build("opt", load("opt.tiny").model, tokenizer(), dataclasses.replace(FACTS, **facts)),
                    tmp_path / "model")
    assert run(tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
