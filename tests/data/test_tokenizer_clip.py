"""CLIP's byte-pairs, roles of special tokens, words of several tokens."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt.config import UserError
from opt.data.tokenizer import ROLES, Tokenizer

DATA = Path(os.environ.get("OPT_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
MERGES = ["r e", "re d</w>", "s t", "st a", "sta r</w>", "a n", "an d</w>", "t h", "th e</w>", "Ã ©</w>", "' s</w>"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "star", "##s", "##ted", "a", ",", "##b"]


def openai_file(folder: Path, merges: list[str] = MERGES) -> Path:
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(("#version\n" + "\n".join(merges) + "\n").encode()))
    return path


def transformers_folder(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> Path:
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


def definition(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    tokenizer.save(folder)
    return json.loads((folder / "tokenizer.json").read_text())["model"]


def bert(folder: Path, lines: list[str] = BERT) -> Path:
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    return folder


def real_captions() -> list[str]:
    path = DATA / "flickr-speech" / "captions.csv"
    if not path.exists():
        pytest.skip("no real data")
    with path.open(encoding="utf-8") as file:
        return [row["caption"] for row in csv.DictReader(file)]


def test_ids_equal_those_of_open_clip_and_transformers(tmp_path: Path) -> None:
    """On 5,000 real captions. open_clip mends more before it cuts (curly quotes, HTML, wide letters: ftfy's work)."""
    open_clip, transformers = pytest.importorskip("open_clip"), pytest.importorskip("transformers")
    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    captions = real_captions()
    tokenizer = Tokenizer.from_clip(file)
    assert (tokenizer.size, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (49408, 49406, 49407, 49407)
    ids = [tokenizer.encode(caption).tolist() for caption in captions]
    reference = open_clip.tokenizer.SimpleTokenizer(str(file))
    assert len(ids) == 5000 and ids == [reference.encode(caption) for caption in captions]
    model = definition(tokenizer, tmp_path)
    transformers_folder(tmp_path, model["vocab"], [" ".join(merge) for merge in model["merges"]])
    assert Tokenizer.from_clip(tmp_path / "vocab.json").fingerprint == tokenizer.fingerprint
    theirs = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert ids == theirs(captions, add_special_tokens=False)["input_ids"]
    tricky = ["Don’t — “the”\u00a0漢字\tcafé cafe\u0301!", "ﬁ Ａ &amp; 🙂 1234x", "İ ẞ", "x" * 200, "", "they'll it'S"]
    assert [tokenizer.encode(text).tolist() for text in tricky] == theirs(tricky, add_special_tokens=False)["input_ids"]


def test_every_layout_is_the_same_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_clip(openai_file(tmp_path))
    assert tokenizer.size == 256 + 256 + len(MERGES) + 2
    model = definition(tokenizer, tmp_path)
    for name in ("plain", "saved", "added"):
        (tmp_path / name).mkdir()
    folder = transformers_folder(tmp_path / "plain", model["vocab"], MERGES)
    theirs = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    theirs.save_pretrained(tmp_path / "saved")
    specials = {name: model["vocab"].pop(name) for name in ("<|startoftext|>", "<|endoftext|>")}
    model["merges"] = [" ".join(merge) for merge in model["merges"]]  # as older versions wrote them
    added = [{"content": name, "id": number} for name, number in specials.items()]
    (tmp_path / "added" / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    for path in (tmp_path, folder, folder / "vocab.json", tmp_path / "saved", tmp_path / "added"):
        assert Tokenizer.from_clip(path).fingerprint == tokenizer.fingerprint


def test_text_comes_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_clip(openai_file(tmp_path))
    assert len(tokenizer.encode("The RED star\n and the star.")) == 7
    for text in ("the red star.", "it's (a t-shirt), isn't it?", "café 漢字 🙂", "", 'a "star", and'):
        ids = tokenizer.encode(text)
        framed = [tokenizer.bos, *ids, tokenizer.eos, *ids, tokenizer.pad]
        assert tokenizer.decode(framed) == text
    tokenizer.save(tmp_path)
    for copy in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint and copy.decode(copy.encode("red café")) == "red café"


def test_no_text_becomes_a_special_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_clip(openai_file(tmp_path))
    ids = tokenizer.encode("a <|endoftext|> <|startoftext|> b")
    assert not np.isin(ids, [tokenizer.bos, tokenizer.eos]).any()
    assert not np.isin(tokenizer.ordinary, [tokenizer.bos, tokenizer.eos]).any()
    assert len(tokenizer.ordinary) == tokenizer.size - 2


@pytest.mark.parametrize("change", [
    lambda content: content[:-9], lambda content: b"", lambda content: b"no archive",
    lambda content: gzip.compress(b"#version\nr e\nre dd</w>\n"), lambda content: gzip.compress(b"#version\nr e d\n"),
    lambda content: gzip.compress(b"\xff\xfe\n\xff\n"),
])
def test_damaged_byte_pairs_are_named(tmp_path: Path, change: Any) -> None:
    path = openai_file(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"16e6.txt.gz holds no byte-pairs of CLIP"):
        Tokenizer.from_clip(tmp_path)


def test_other_byte_pairs_are_refused(tmp_path: Path) -> None:
    model = definition(Tokenizer.from_clip(openai_file(tmp_path)), tmp_path)
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / "tokenizer.json"
    holes = {token: 2 * number for token, number in model["vocab"].items()}
    for content in ({"model": {**model, "end_of_word_suffix": ""}}, {"model": {**model, "type": "Unigram"}}, [], {},
                    {"model": {**model, "vocab": holes}}, {"model": {**model, "vocab": {"a": 0}, "merges": []}}):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"tokenizer.json holds no byte-pairs of CLIP"):
            Tokenizer.from_clip(path.parent)
    for missing, message in ((tmp_path / "none", "does not exist"), (bert(path.parent) / "x", "does not exist")):
        with pytest.raises(UserError, match=message):
            Tokenizer.from_clip(missing)
    transformers_folder(path.parent, model["vocab"], MERGES)
    (path.parent / "merges.txt").unlink()
    with pytest.raises(UserError, match="vocab.json holds no byte-pairs"):
        Tokenizer.from_clip(path.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected vocab.json and merges.txt"):
        Tokenizer.from_clip(tmp_path / "empty")


def test_roles_are_those_of_the_vocabulary(tmp_path: Path) -> None:
    clip = Tokenizer.from_clip(openai_file(tmp_path))
    ordinary, blip = Tokenizer.from_bert(bert(tmp_path)), Tokenizer.from_blip(tmp_path)
    size = len(BERT)
    assert (ordinary.bos, ordinary.eos, ordinary.size) == (size, size + 1, size + 2)
    assert (blip.bos, blip.enc, blip.size) == (size, size + 1, size + 2)  # [DEC], then [ENC]
    assert blip.eos == blip.sep == 3 and blip.mask == ordinary.enc == 4
    assert (clip.bos, clip.eos, clip.pad) == (clip.size - 2, clip.size - 1, clip.size - 1)
    for role in ("cls", "sep", "mask", "enc"):
        with pytest.raises(UserError, match=f"no token for {role} .*choose words that have it"):
            getattr(clip, role)
    assert blip.decode([blip.bos, 5, 6, blip.eos, 5]) == "red star"
    assert blip.decode([blip.enc, 5, blip.mask, 6]) == "red star"
    assert all(isinstance(getattr(Tokenizer.train(["a red star", "a red cube"], 100), role), int) for role in ROLES)
    for tokenizer in (ordinary, blip):
        tokenizer.save(tmp_path)
        assert Tokenizer.load(tmp_path).enc == tokenizer.enc
        assert np.isin(tokenizer.ordinary, np.arange(5, size)).all()


def test_blip_keeps_tokens_that_its_files_have(tmp_path: Path) -> None:
    blip = Tokenizer.from_blip(bert(tmp_path, [*BERT, "[ENC]", "[DEC]"]))
    assert (blip.enc, blip.bos, blip.size) == (len(BERT), len(BERT) + 1, len(BERT) + 2)
    for reader in (Tokenizer.from_bert, Tokenizer.from_blip):
        assert reader(tmp_path / "vocab.txt").fingerprint == reader(tmp_path).fingerprint


def test_words_of_several_tokens(tmp_path: Path) -> None:
    ordinary = Tokenizer.from_bert(bert(tmp_path))
    ids = ordinary.encode("stars, redbs a started")
    assert ordinary.words_of(ids).tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4]
    assert ordinary.words_of(np.append([ordinary.cls], ids[:2])).tolist() == [0, 1, 1]
    assert ordinary.words_of(ids[1:4]).tolist() == [0, 1, 2]  # a text that begins within a word
    clip = Tokenizer.from_clip(openai_file(tmp_path))
    ids = clip.encode("red's starx the")
    assert clip.words_of(ids).tolist() == [0, 1, 2, 2, 2, 3] and clip.words_of(ids).dtype == np.int64
    assert clip.words_of(np.array([clip.bos, *ids[:3], clip.eos])).tolist() == [0, 1, 2, 3, 4]  # cut within a word
    assert clip.words_of(ids[:0]).tolist() == ordinary.words_of(ids[:0]).tolist() == []
