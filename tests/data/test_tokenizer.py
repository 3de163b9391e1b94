"""The tokenizer: whole words, deterministic training, BERT's own answers."""

from __future__ import annotations

import csv
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opt.config import UserError
from opt.data.tokenizer import SPECIALS, Tokenizer

DATA = Path(os.environ.get("OPT_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
SHAPES = ["cube", "circle", "triangle", "star", "heart", "cross", "ring", "hexagon"]
CAPTIONS = [f"A {colour} {shape} is left of two {colour} {shape}s." for colour in COLOURS for shape in SHAPES]


def vocabulary_file() -> Path:
    path = DATA / "vocab" / "bert-base-uncased.txt"
    if not path.exists():
        pytest.skip("no real data")
    return path


def real_captions() -> list[str]:
    path = DATA / "flickr-speech" / "captions.csv"
    if not path.exists():
        pytest.skip("no real data")
    with path.open(encoding="utf-8") as file:
        return [row["caption"] for row in csv.DictReader(file)]


def test_words_that_occur_twice_are_one_token() -> None:
    tokenizer = Tokenizer.train([*CAPTIONS, "once"], 1000)
    words = {word for caption in CAPTIONS for word in caption.lower().replace(".", " .").split()}
    assert all(len(tokenizer.encode(word)) == 1 for word in words)
    assert len(tokenizer.encode("once")) > 1
    assert tokenizer.size < 1000
    assert not np.isin(tokenizer.encode("once greener rings"), [tokenizer.unk]).any()


def test_training_depends_on_captions_alone() -> None:
    fingerprint = Tokenizer.train(CAPTIONS, 200).fingerprint
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    assert all(Tokenizer.train(shuffled, 200).fingerprint == fingerprint for _ in range(3))
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]\nimport test_tokenizer as t\n"
        "print(t.Tokenizer.train(t.CAPTIONS, 200).fingerprint)"
    )
    here = Path(__file__).parent
    answer = subprocess.run(
        [sys.executable, "-c", code, str(here), str(here.parents[1])], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == fingerprint


def test_training_on_real_captions_is_deterministic() -> None:
    captions = real_captions()[:2000]
    tokenizers = [Tokenizer.train(captions, 1500) for _ in range(2)]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint
    assert tokenizers[0].size == 1500


def test_special_tokens_are_apart() -> None:
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    specials = [getattr(tokenizer, name) for name in ("pad", "unk", "cls", "sep", "mask", "bos", "eos")]
    assert specials == list(range(7))
    assert not np.isin(tokenizer.ordinary, specials).any()
    assert len(tokenizer.ordinary) == tokenizer.size - len(SPECIALS)
    assert not np.isin(tokenizer.encode("[MASK] red [SEP]"), [tokenizer.mask, tokenizer.sep]).any()


def test_encode_cuts_and_decode_joins() -> None:
    tokenizer = Tokenizer.train([*CAPTIONS, "it's (a t-shirt), isn't it?"] * 2, 400)
    ids = tokenizer.encode("A red cube.")
    assert ids.dtype == np.int64 and len(ids) == 4
    assert len(tokenizer.encode("A red cube.", 2)) == 2
    for text in ("a red cube.", "it's (a t-shirt), isn't it?", "a reddish cub"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    framed = [tokenizer.bos, tokenizer.cls, *ids, tokenizer.eos, *ids, tokenizer.pad]
    assert tokenizer.decode(framed) == "a red cube."
    assert tokenizer.decode(np.array(framed)) == "a red cube."
    assert tokenizer.decode([]) == ""
    assert len(tokenizer.encode("")) == 0


def test_it_travels(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    tokenizer.save(tmp_path)
    copies = [Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))]
    for copy in copies:
        assert copy.fingerprint == tokenizer.fingerprint
        assert np.array_equal(copy.encode(CAPTIONS[3]), tokenizer.encode(CAPTIONS[3]))
    with pytest.raises(UserError, match="tokenizer.json does not exist"):
        Tokenizer.load(tmp_path / "elsewhere")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no captions"):
        Tokenizer.train([], 100)
    with pytest.raises(UserError, match="20 tokens does not hold"):
        Tokenizer.train(CAPTIONS, 20)
    (tmp_path / "vocab.txt").write_text("[PAD]\na\nb\na\n")
    with pytest.raises(UserError, match="'a' stands there twice"):
        Tokenizer.from_vocab(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.from_vocab(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b'{"image_id": 1}\n', b"[PAD]\n[UNK]\n", b"[UNK]\n\xff\xfe\n", bytes(99)]
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"vocab.txt"):
        Tokenizer.from_vocab(tmp_path / "vocab.txt")


@pytest.mark.parametrize("content", ["", "{}", "[]", "\udcff"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_bert_vocabulary_keeps_its_ids() -> None:
    tokenizer = Tokenizer.from_vocab(vocabulary_file())
    assert (tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 100, 101, 102, 103)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.size) == (30522, 30523, 30524)
    assert tokenizer.ordinary.min() > 103 and tokenizer.ordinary.max() < 30522


def test_ids_equal_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    captions = [*real_captions(), "Ünïcode — “quotes” 漢字 naïve\tcafé\u00a0!", "x" * 150]
    tokenizer = Tokenizer.from_vocab(vocabulary_file())
    theirs = transformers.BertTokenizer(vocab=str(vocabulary_file()), do_lower_case=True)
    expected = theirs(captions, add_special_tokens=False)["input_ids"]
    assert [tokenizer.encode(caption).tolist() for caption in captions] == expected


LOWER = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
         "naive", "cafe", "the", "##s", "##re", "i", "'", "!",
         "u", "##ni", "don", "t", "漢", "字", "-", ".", "red", "x", "##x", "…", "“", "a", "strasse",
         "straße", "istanbul", "##code"]
CASED = [*LOWER, "Naïve", "Café", "The", "RED", "X", "É", "é", "İ", "##É", "Straße", "##S"]
TRICKY = ["The naïve Café, the cafés!", "RED red Red", "Don't — “the” RED-the…", "漢字x漢 X漢X",
          "ÜNİ\tunİ\u00a0the\u200bred", "É é E\u0301 e\u0301", "Straße STRASSE strasse", "xxxxS" * 30, "",
          "\x00a\ufffd \n a", "ﬁ Ａ ａ", "🙂the", "İstanbul i̇", "a" * 101]


def bert_folder(folder: Path, lines: list[str], settings: dict[str, object] | None) -> Path:
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(("lines", "settings", "lower"), [
    (LOWER, None, True), (CASED, None, False),
    (LOWER, {"do_lower_case": False}, False), (CASED, {"do_lower_case": True}, True),
    (CASED, {"model_max_length": 512}, False), (LOWER, {"do_lower_case": True, "strip_accents": None}, True),
])
def test_cased_and_lower_case_ids_equal_those_of_transformers(
    tmp_path: Path, lines: list[str], settings: dict[str, object] | None, lower: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = bert_folder(tmp_path, lines, settings)
    path = str(folder / "vocab.txt")
    for theirs in (transformers.BertTokenizer(path, do_lower_case=lower),
                   transformers.BertTokenizerFast(path, do_lower_case=lower)):
        expected = theirs(TRICKY, add_special_tokens=False)["input_ids"]
        for tokenizer in (Tokenizer.from_vocab(folder / "vocab.txt"), Tokenizer.from_bert(folder)):
            assert [tokenizer.encode(text).tolist() for text in TRICKY] == expected
    assert len({tuple(tokenizer.encode(text)) for text in ("RED", "red")}) == (1 if lower else 2)
    assert not np.isin(tokenizer.encode("[MASK] red [SEP]"), [tokenizer.mask, tokenizer.sep]).any()


@pytest.mark.parametrize("lower", [False, True])
def test_a_folder_with_tokenizer_json_alone(tmp_path: Path, lower: bool) -> None:
    """As transformers 5 saves it."""
    transformers = pytest.importorskip("transformers")
    folder = bert_folder(tmp_path, CASED, {"do_lower_case": lower})
    theirs = transformers.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=lower)
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.txt").exists()
    assert Tokenizer.from_bert(tmp_path / "saved").fingerprint == Tokenizer.from_bert(folder).fingerprint
    content = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    for changed in ({**content, "normalizer": None}, {**content, "model": {"type": "BPE", "vocab": {"a": 0}}}, []):
        (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="no tokenizer of BERT's form"):
            Tokenizer.from_bert(tmp_path / "saved")


@pytest.mark.parametrize("settings", [
    {"do_lower_case": False, "strip_accents": True}, {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": True, "tokenize_chinese_chars": False}, {"do_lower_case": "yes"}, ["do_lower_case"],
])
def test_other_normalisation_than_berts_is_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match="tokenizer_config.json"):
        Tokenizer.from_vocab(bert_folder(tmp_path, LOWER, settings) / "vocab.txt")


def test_a_cased_tokenizer_travels(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_vocab(bert_folder(tmp_path, CASED, None) / "vocab.txt")
    tokenizer.save(tmp_path)
    for copy in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert [copy.encode(text).tolist() for text in TRICKY] == [tokenizer.encode(text).tolist() for text in TRICKY]
    assert tokenizer.decode(tokenizer.encode("The Naïve RED")) == "The Naïve RED"
