"""result.schema.json describes a result wholly: what the code writes, and nothing else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fixtures import FACTS, fake_sample, fake_shards, tokenizer
from jsonschema import Draft202012Validator
from training import MODEL

from eval import result as results
from eval.protocols import PROTOCOLS, Protocol
from eval.result import Metric, Provenance, Result, read_result, write_result
from opt.checkpoint import save_pretrained
from opt.cli import main
from opt.config import UserError
from opt.data.manifest import FrozenPart, Origin, write_manifest
from opt.data.split import keys_sha256
from opt.history import Corpus, Stage
from opt.systems.system import build

SCHEMA = json.loads(Path(results.__file__).with_name("result.schema.json").read_text())
COCO = Origin("coco", "test")
WHOLE = Result(
    "caption",
    (Metric("caption.bleu4", 0.31, 5000, (0.3, 0.32), 0.01, "a stranger's caption", modalities=("image",),
            protocol="bleu/coco"),
     Metric("text_to_image.fid", 23.4, 5000, unit="score", better="lower", rerank_k=3)),
    Provenance(
        "opt", "a" * 64, "b" * 64, 5000, 0, "opt eval caption m s", "0.1.0", ("audio",), {"audio": {"weights": "tiny"}},
        "ours-5k", "test", "c" * 64, (COCO,),
        (Stage("pretrain", "opt.tiny", (Corpus((COCO, Origin("x", "")), "d" * 64, 9),), "bert ff", 7, 63),
         Stage("finetune", "captioning", (Corpus((COCO,), "b" * 64, 9),), "model ee", 7, 63)),
        "fine-tuned", "float32", 64, {"torch": "2.14.1"}, "cpu x86_64",
    ),
    1.5, {"caption.spice": "no java here"}, [{"key": "1", "text": "a cat"}], [{"key": "2", "failure": "all wrong"}],
)  # fmt: skip


def test_it_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    ("kind", "place"),
    [(Result, SCHEMA), *((kind, SCHEMA["$defs"][name]) for kind, name in (
        (Metric, "metric"), (Provenance, "provenance"), (Origin, "origin"), (Stage, "stage"), (Corpus, "corpus")))],
)
def test_it_has_every_field_and_no_other(kind, place):
    fields = {field.name for field in dataclasses.fields(kind)} | ({"schema"} if kind is Result else set())
    assert set(place["properties"]) == set(place["required"]) == fields and not place["additionalProperties"]
    assert SCHEMA["properties"]["schema"]["const"] == results.SCHEMA


def test_a_result_comes_back_as_it_was(tmp_path):
    assert read_result(write_result(WHOLE, tmp_path)) == WHOLE
    assert WHOLE.provenance.seen and not dataclasses.replace(WHOLE.provenance, split_sha256="e" * 64).seen


def change(content, place, value):
    *way, last = place
    for step in way:
        content = content[step]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("metrics", 1, "value"), "high", r"metrics\[1\].value: 'high' is not of type 'number'"),
        (("metrics", 0, "interval"), [0.1], r"metrics\[0\].interval"),
        (("metrics", 0, "protocol"), None, r"metrics\[0\]: 'protocol' is a required property"),
        (("metrics", 0, "modalities"), ["smell"], r"metrics\[0\].modalities\[0\]"),
        (("provenance", "model_sha256"), "a" * 63, "provenance.model_sha256"),
        (("provenance", "regime"), "few-shot", "provenance.regime"),
        (("provenance", "trained_on", 0, "steps"), -1, r"provenance.trained_on\[0\].steps"),
        (("provenance", "colour"), "red", "provenance: .*colour"),
        (("schema",), 1, "schema: 2 was expected"),
        (("worst", 0, "failure"), None, r"worst\[0\]"),
        (("absent", "caption.spice"), "", "absent"),
        (("provenance",), "z" * 500, "provenance: .{0,170}; run"),
    ],
)
def test_an_ill_formed_file_is_a_sentence_that_names_the_place(tmp_path, place, value, said):
    path = write_result(WHOLE, tmp_path)
    content = json.loads(path.read_text())
    change(content, place, value)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_result(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b'{"schema": 2}', b"[" * 100_000])
def test_no_result_at_all_is_a_sentence(tmp_path, content):
    (tmp_path / "caption.json").write_bytes(content)
    with pytest.raises(UserError, match="caption.json"):
        read_result(tmp_path / "caption.json")
    with pytest.raises(UserError, match="not there"):
        read_result(tmp_path / "other.json")


@pytest.mark.parametrize(
    "wrong", [{"value": float("nan")}, {"unit": "metres"}, {"n": 2.5}, {"modalities": ("smell",)}, {"interval": (0.1,)}]
)
def test_what_the_schema_forbids_is_not_written(tmp_path, wrong):
    metric = dataclasses.replace(WHOLE.metrics[0], **wrong)
    with pytest.raises(ValueError):
        write_result(dataclasses.replace(WHOLE, metrics=(metric,)), tmp_path)
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model that was trained on scenes, and shards of a frozen split of them."""
    folder = tmp_path_factory.mktemp("schema")
    scenes = Origin("spoken_scenes", "train")
    stage = Stage("pretrain", "opt.tiny", (Corpus((scenes,), "d" * 64, 40),), "", 12, 480)
    config = dataclasses.replace(MODEL, dropout=0.0, alignment_weight=1.0)
    save_pretrained(build("opt", config, tokenizer(), FACTS), folder / "model", history=(stage,))
    for name, numbers in (("test", range(12)), ("train", range(100, 140))):
        made = fake_shards(folder / name, [fake_sample(number) for number in numbers]).manifest
        write_manifest(folder / name, [shard.name for shard in made.shards], {}, made.region_classes, made.codebook,
                       origins=(Origin("spoken_scenes", "test"),), split=FrozenPart("scenes-12", name, "e" * 64))
    numbers = [*range(12), *range(100, 140)]
    labels = [{"image_id": f"sample{number}", "labels": ["red", "blue"][: 1 + number % 2]} for number in numbers]
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labels))
    return folder


@pytest.mark.parametrize("verb", ["retrieval", "transcribe", "caption", "classify"])
def test_what_the_verbs_write_says_all_of_it(root, tmp_path, verb):
    more = ["--train-shards", f"{root}/train", "--labels", f"{root}/labels.jsonl"] if verb == "classify" else []
    words = ["eval", verb, str(root / "model"), str(root / "test"), "--out", str(tmp_path), "--limit", "10", *more]
    assert main(words) == 0
    found = read_result(tmp_path / f"{verb}.json")
    told = found.provenance
    assert (told.regime, told.split, told.part, told.samples) == ("in-domain", "scenes-12", "test", 10)
    assert told.split_keys_sha256 == keys_sha256([f"sample{number}" for number in range(10)])
    assert told.trained_on[0].corpora[0].origins == (Origin("spoken_scenes", "train"),)
    assert (told.precision, told.text_limit, told.device[:3]) == ("float32", MODEL.text_positions, "cpu")
    assert torch.__version__.startswith(told.packages["torch"].partition("+")[0])
    assert found.metrics and not [metric.name for metric in found.metrics if not metric.protocol]


def test_a_named_protocol_says_which_samples_it_kept(root, tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "twelve", Protocol("twelve", 12, 1, 2, 3, "", ""))
    assert main(["eval", "retrieval", str(root / "test"), str(root / "test"), "--protocol", "twelve"]) == 2
    words = ["eval", "retrieval", str(root / "model"), str(root / "test"), "--out", str(tmp_path)]
    assert main([*words, "--protocol", "twelve"]) == 0
    found = read_result(tmp_path / "retrieval.json")
    by_name = {metric.name: metric for metric in found.metrics}
    two_stage = by_name["retrieval.text_to_image.r1_two_stage"]
    assert two_stage.rerank_k == 3 and "in each of 2 folds" in two_stage.candidates and "twelve" in two_stage.note
    assert found.provenance.samples == 12
    assert found.provenance.split_keys_sha256 == keys_sha256([f"sample{number}" for number in range(12)])
    assert main([*words, "--protocol", "coco-5k"]) == 2
