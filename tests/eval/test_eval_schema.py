"""result.schema.json describes a result wholly: what the code writes, and nothing else."""

import dataclasses
import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from eval import result as results
from eval.result import Metric, Provenance, Result, read_result, write_result
from opt.config import UserError
from opt.data.manifest import Origin
from opt.history import Corpus, Stage

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
