"""Wrong use gives a sentence: every verb that reads a model, shards or results, and everything that is none of these.

A wrong word ends a verb with status 2 and one line on the standard error (bars of work that had begun aside), never
with a traceback; the line names what is wrong.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fixtures import FACTS, fake_sample, fake_shards, tokenizer
from PIL import Image
from training import MODEL

from opt.checkpoint import save_pretrained
from opt.cli import VERBS, main
from opt.data.manifest import write_manifest
from opt.data.shards import ShardWriter
from opt.systems.system import build, load

EXTRACTORS = {"regions": {"backend": "made up", "weights_sha256": "a" * 64}}
LACKS = {
    "text": {"pictures": (), "speech": None},
    "picture": {"caption": None, "speech": None},
    "speech": {"pictures": (), "caption": None},
    "codes": {"caption": None, "speech": None, "regions": None},
    "codes_told": {"regions": None},
}
"""Shards by what they hold alone, and what is taken from a whole sample for them."""


def made(folder: Path, extractors: dict = EXTRACTORS, numbers: range = range(12), **without: object) -> None:
    """Shards of samples without some parts, made by these extractors."""
    samples = [fake_sample(number) for number in numbers]
    if "regions" in without:
        blind = dict.fromkeys(("regions", "boxes", "classes", "scores"))
        samples = [dataclasses.replace(sample, pictures=(dataclasses.replace(sample.pictures[0], **blind),))
                   for sample in samples]
    parts = {name: value for name, value in without.items() if name != "regions"}
    manifest = fake_shards(folder, [dataclasses.replace(sample, **parts) for sample in samples]).manifest
    write_manifest(folder, [shard.name for shard in manifest.shards], extractors, manifest.region_classes,
                   manifest.codebook)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, good and bad; shards of all kinds; questions, labels, a picture and a recording."""
    folder = tmp_path_factory.mktemp("wrong")
    facts = dataclasses.replace(FACTS, extractors=EXTRACTORS)
    config = dataclasses.replace(MODEL, dropout=0.0, alignment_weight=1.0)
    save_pretrained(build("opt", config, tokenizer(), facts), folder / "model")
    small = dataclasses.replace(load("dvae.tiny").model, codebook=16, widths=(8, 8, 8))
    save_pretrained(build("dvae", small, None, facts), folder / "dvae")
    for name in ("words", "wordless", "cut", "garbled"):
        shutil.copytree(folder / "model", folder / name)
    words = folder / "words" / "tokenizer.json"
    words.write_text(words.read_text().replace('"red"', '"rad"'))
    (folder / "wordless" / "tokenizer.json").unlink()
    (folder / "cut" / "model.safetensors").write_bytes(b"123")
    (folder / "garbled" / "config.json").write_text("{")
    shutil.copytree(folder / "model", folder / "run" / "model")
    made(folder / "whole")
    made(folder / "train", numbers=range(100, 130))
    made(folder / "foreign", {"regions": {"backend": "made up", "weights_sha256": "b" * 64}})
    for name, without in LACKS.items():
        made(folder / name, **without)
    with ShardWriter(folder / "empty", "00000"):
        pass
    write_manifest(folder / "empty", ["00000"], EXTRACTORS, FACTS.region_classes, FACTS.codebook)
    numbers = [*range(12), *range(100, 130)]
    asked = [{"image_id": f"sample{n}", "question": "what is red", "answers": ["red"]} for n in numbers]
    named = [{"image_id": f"sample{n}", "labels": ["red", "blue"][: 1 + n % 2]} for n in numbers]
    judged = [{"image_ids": [f"sample{n}", f"sample{n + 1}"], "question": "both are red", "answers": ["true"]}
              for n in numbers[:10]]
    for name, lines in (("questions", asked), ("labels", named), ("statements", judged)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (64, 64)).save(folder / "picture.jpg")
    soundfile.write(folder / "talk.wav", np.full(16000, 0.01, np.float32), 16000)
    return folder


def more_words(verb: str, root: Path) -> list[str]:
    """What a verb needs besides a model and shards."""
    return {"eval vqa": ["--questions", f"{root}/questions.jsonl"],
            "eval nlvr2": ["--statements", f"{root}/statements.jsonl"],
            "eval zero-shot": ["--labels", f"{root}/labels.jsonl"],
            "eval classify": ["--train-shards", f"{root}/train", "--labels", f"{root}/labels.jsonl"]}.get(verb, [])


EVALUATIONS = [verb for verb in VERBS if verb.startswith("eval ")]


def refused(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    """The sentence with which a command line is refused."""
    capfd.readouterr()
    status = main([str(word) for word in words])
    lines = [line for line in capfd.readouterr().err.splitlines() if not re.search(r"took \d+:\d\d$", line)]
    assert status == 2 and len(lines) == 1 and ": error: " in lines[0], (status, lines)
    assert "Error" not in lines[0].replace(": error:", ""), lines[0]
    return lines[0]


@pytest.fixture
def evaluation(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """evaluation(verb, model, shards, *options) -> the sentence; nothing must be left in the results' folder."""

    def refuse(verb: str, model: str, shards: str, *options: str) -> str:
        out = tmp_path / "results"
        said = refused(capfd, *verb.split(), root / model, root / shards, "--out", out, *more_words(verb, root),
                       *options)
        assert not list(out.glob("*.json"))
        return said

    return refuse


@pytest.mark.parametrize("verb", EVALUATIONS)
@pytest.mark.parametrize(
    ("model", "said"),
    [("dvae", "cannot|without image codes|looks at stored JPEGs"), ("words", "another tokenizer"),
     ("wordless", "tokenizer.json does not exist"), ("cut", "not the file config.json was written for"),
     ("garbled", "config.json is damaged"), ("run", "is the folder of a run; give .*run/model"),
     ("nothing", "holds no model"), ("picture.jpg", "holds no model"), ("whole", "holds no model")],
)
def test_what_is_no_fit_model(evaluation, verb: str, model: str, said: str):
    assert re.search(said, evaluation(verb, model, "whole"))


@pytest.mark.parametrize("verb", EVALUATIONS)
@pytest.mark.parametrize(
    ("shards", "said"),
    [("empty", "empty holds no samples"), ("foreign", "another extractor"), ("model", "holds no shards"),
     ("nothing", "is not a folder"), ("picture.jpg", "is not a folder")],
)
def test_what_are_no_fit_shards(evaluation, verb: str, shards: str, said: str):
    assert re.search(said, evaluation(verb, "model", shards))


@pytest.mark.parametrize("verb", EVALUATIONS)
@pytest.mark.parametrize("option", ["limit 0", "limit -1", "batch 0", "seed -1"])
def test_numbers_out_of_range(evaluation, verb: str, option: str):
    assert f"--{option} must be at least" in evaluation(verb, "model", "whole", *f"--{option}".split())


@pytest.mark.parametrize(
    ("verb", "shards", "said"),
    [
        ("eval retrieval", "text", "hold no caption with a picture; nor is there what 11 other directions need"),
        ("eval retrieval", "picture", "hold no"),
        ("eval retrieval", "speech", "hold no"),
        ("eval transcribe", "text", "no recording with its words"),
        ("eval transcribe", "picture", "no recording with its words"),
        ("eval transcribe", "speech", "no recording with its words"),
        ("eval caption", "text", "hold no picture"),
        ("eval caption", "speech", "hold no picture"),
        ("eval caption", "codes", "a picture without regions"),
        ("eval vqa", "text", "without a picture"),
        ("eval vqa", "speech", "without a picture"),
        ("eval vqa", "whole", "before it is tuned for that"),
        ("eval nlvr2", "text", "without a picture"),
        ("eval nlvr2", "speech", "without a picture"),
        ("eval nlvr2", "whole", "before it is tuned for that"),
        ("eval classify", "codes", "a picture without regions"),
        ("eval zero-shot", "text", "hold no picture"),
        ("eval zero-shot", "codes", "a picture without regions"),
        *(("eval text-to-image", shards, "image codes|cannot be opened") for shards in LACKS),
    ],
)
def test_shards_without_that_modality(evaluation, verb: str, shards: str, said: str):
    assert re.search(said, evaluation(verb, "model", shards))


TASKS = {"captioning": "text and image", "retrieval-margin": "text and image",
         "retrieval-in-batch": "two of text, picture and speech"}


@pytest.mark.parametrize("task", [*TASKS, "vqa-words", "vqa-classes"])
def test_fine_tuning_what_cannot_be_tuned(root: Path, tmp_path: Path, capfd, task: str):
    asked = ["--questions", root / "questions.jsonl"] if task.startswith("vqa") else []

    def tune(model: str, shards: str) -> str:
        return refused(capfd, "finetune", task, "--model", root / model, "--shards", root / shards, "--out",
                       tmp_path / "run", *asked)

    for shards in ("text", "speech", "codes", "empty"):
        assert re.search("regions" if asked else f"no sample with {TASKS[task]}", tune("model", shards))
    assert "another extractor" in tune("model", "foreign")
    for model, said in (("dvae", "system 'dvae'"), ("words", "another tokenizer"), ("run", "folder of a run")):
        assert said in tune(model, "whole")
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model", "nothing to begin with"), ("model --text red", "already text"),
        ("model --image {root}/picture.jpg", "cannot be opened|extractor"),
        ("model --image {root}/none.jpg", "none.jpg|cannot be opened"),
        ("model --audio {root}/talk.wav", "extractor its audio came from"),
        ("dvae --image {root}/picture.jpg", "extractor|cannot"),
        ("words --image {root}/picture.jpg", "another tokenizer"),
        ("run --image {root}/picture.jpg", "folder of a run"), ("whole --image {root}/picture.jpg", "holds no model"),
    ],
)
def test_generating_from_what_does_not_fit(root: Path, capfd, words: str, said: str):
    model, *rest = words.format(root=root).split()
    assert re.search(said, refused(capfd, "generate", root / model, *rest))


@pytest.mark.parametrize(
    ("model", "shards", "said"),
    [("dvae", "whole", "cannot embed"), ("words", "whole", "another tokenizer"), ("run", "whole", "folder of a run"),
     ("model", "foreign", "another extractor"), ("model", "nothing", "is not a folder"),
     ("model", "codes", "a picture without regions"), ("model", "empty", "hold")],
)
def test_an_index_of_what_does_not_fit(root: Path, tmp_path: Path, capfd, model: str, shards: str, said: str):
    assert said in refused(capfd, "index", root / model, root / shards, "--out", tmp_path / "index")
    assert "index" in refused(capfd, "search", tmp_path / "index", "--text", "red")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("results/caption.json", "{", r"caption\.json is damaged"),
        ("results/caption.json", "[]", r"caption\.json is not a result of this version \(the whole"),
        ("results/caption.json", '{"schema": 1}', "is not a result of this version"),
        ("config.json", "[]", "must hold a JSON object"),
        ("other.json", "{}", "holds neither"),
    ],
)
def test_a_report_of_what_is_no_run(tmp_path: Path, capfd, name: str, content: str, said: str):
    (tmp_path / "run" / "results").mkdir(parents=True)
    (tmp_path / "run" / name).write_text(content)
    if name == "config.json":
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert re.search(said, refused(capfd, "report", tmp_path / "run"))
    assert not list(tmp_path.rglob("*.html"))


def test_a_report_of_a_model_shards_or_nothing(root: Path, tmp_path: Path, capfd):
    for name in ("model", "whole", "none", "picture.jpg"):
        assert "holds neither" in refused(capfd, "report", root / name, "--out", tmp_path / "page.html")
    assert "no RUN given" in refused(capfd, "report")
