"""SentencePiece's files: the likeliest pieces by hand and as transformers finds them, ids as XLM-R counts, damage."""

from __future__ import annotations

import itertools
import math
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt.config import UserError
from opt.data import sentence_pieces
from opt.data.tokenizer import ROLES, Tokenizer

FIRST = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
PIECES = [("▁", -2.5, 1), ("▁red", -3.0, 1), ("▁star", -3.5, 1), ("s", -2.0, 1), ("r", -4.0, 1), ("e", -4.0, 1),
          ("d", -4.25, 1), ("re", -6.5, 1), ("st", -5.0, 1), ("ar", -5.5, 1), ("star", -9.0, 1), ("t", -4.0, 1),
          ("a", -3.75, 1), (",", -3.0, 1), ("▁a", -2.75, 1), ("'", -5.0, 1), ("dst", -9.75, 1), ("é", -7.0, 1)]
CHANGES = {"ｒ": "r", "é": "é", "\t": " ", "ﬆ": "st", "…": "...", "\x07": "", "É": "e"}
TEXTS = ["red stars", "a redstar, red's", "  a\t red   ", "", "résteds", "ｒed ﬆa…", "xyz redx y", "漢字 red", "rrrr",
         "a\x07star", "ÉＡ", "e\u0301a", "red <mask> a <s></s> <pad>", "▁▁red"]


def varint(value: int) -> bytes:
    written = b""
    while value > 127:
        written, value = written + bytes([value & 127 | 128]), value >> 7
    return written + bytes([value])


def field(number: int, value: int | float | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def charsmap(changes: dict[str, str]) -> bytes:
    """A table as SentencePiece stores it; each node of the trie has a block of 256 units of its own."""
    units, blocks, texts = [0] * 256, {b"": 0}, b""
    ends = {}
    for text, other in changes.items():
        ends[text.encode()] = len(texts)
        texts += other.encode() + b"\0"
    for key in sorted({text.encode()[:length] for text in changes for length in range(1, len(text.encode()) + 1)}):
        blocks[key] = len(units)
        units += [0] * 256
    for key, block in blocks.items():
        place = blocks[key[:-1]] + key[-1] if key else 0
        units[place] |= (place ^ block) << 10 | (key[-1] if key else 0)
        if key in ends:
            units[place] |= 256
            units[block] = ends[key] | 1 << 31
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + texts


def model_file(
    folder: Path, pieces: Any = (*FIRST, *PIECES), trainer: bytes = b"", rules: bytes = field(2, charsmap(CHANGES)),
) -> Path:
    path = folder / "tiny.spm"
    written = [field(1, field(1, text) + field(2, score) + (field(3, kind) if kind != 1 else b""))
               for text, score, kind in pieces]
    path.write_bytes(b"".join(written) + field(2, field(3, 1) + trainer) + field(3, field(1, "tiny") + rules))
    return path


def likeliest(text: str) -> list[str]:
    """By trying every way to cut a normalised text of few letters; a letter that is no piece costs 10 more than any,
    and neighbours of these are one."""
    scores = {piece: score for piece, score, _ in PIECES}
    unknown, best = min(scores.values()) - 10, -math.inf
    found: list[str] = []
    for cuts in itertools.product([False, True], repeat=max(len(text) - 1, 0)):
        pieces = [""]
        for letter, cut in zip(text, [False, *cuts], strict=True):
            pieces = [*pieces, letter] if cut else [*pieces[:-1], pieces[-1] + letter]
        if all(piece in scores or len(piece) == 1 for piece in pieces):
            score = sum(scores.get(piece, unknown) for piece in pieces)
            best, found = max((best, found), (score, pieces))
    named = [piece if piece in scores else "<unk>" for piece in found]
    return [piece for place, piece in enumerate(named) if not place or (piece, named[place - 1]) != ("<unk>", "<unk>")]


def names(tokenizer: Tokenizer, text: str) -> list[str]:
    return [str(tokenizer._pieces.id_to_token(number)) for number in tokenizer.encode(text)]


def test_pieces_are_the_likeliest(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_sentence_pieces(model_file(tmp_path))
    for text, normal in (("red stars", "▁red▁stars"), ("redstars", "▁redstars"), ("a,a red", "▁a,a▁red"),
                         (" édsté ", "▁édsté"), ("ｒe\tﬆar", "▁re▁star"), ("axya", "▁axya"), ("es xx…", "▁es▁xx..."),
                         ("sta\x07red", "▁stared")):
        assert names(tokenizer, text) == likeliest(normal), text


def test_ids_are_those_of_xlm_r(tmp_path: Path) -> None:
    """As transformers has them, which takes texts that spell a special token out for it."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_sentence_pieces(model_file(tmp_path))
    vocabulary = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")] + [piece[:2] for piece in PIECES]
    theirs = transformers.XLMRobertaTokenizer(vocab=[*vocabulary, ("<mask>", 0.0)],
                                              _spm_precompiled_charsmap=charsmap(CHANGES))
    for text in TEXTS:
        if "<" not in text:
            expected = theirs(text)["input_ids"]
            assert [tokenizer.cls, *tokenizer.encode(text), tokenizer.sep] == expected, text
            assert tokenizer.decode(expected) == " ".join(theirs.decode(expected, skip_special_tokens=True).split())
    assert tokenizer.size == len(PIECES) + 5 == len(theirs)
    assert (tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert (tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 2, tokenizer.size - 1)
    assert tokenizer.encode("red").tolist() == [4 + PIECES.index(("▁red", -3.0, 1))]
    assert all(isinstance(getattr(tokenizer, role), int) for role in ROLES)
    assert tokenizer.specials.tolist() == [0, 1, 2, 3, tokenizer.size - 1]
    assert tokenizer.ordinary.tolist() == [*range(4, tokenizer.size - 1)]


def test_the_file_is_read_as_protobuf_reads_it(tmp_path: Path) -> None:
    pb2 = pytest.importorskip("transformers.utils.sentencepiece_model_pb2_new")
    message = pb2.ModelProto()
    for text, score, kind in (*FIRST, *PIECES):
        message.pieces.add(piece=text, score=score, type=kind)
    message.trainer_spec.model_type, message.trainer_spec.vocab_size = 1, 21
    message.trainer_spec.input.extend(["one.txt", "another.txt"])
    message.trainer_spec.character_coverage = 0.9995
    message.normalizer_spec.precompiled_charsmap = charsmap(CHANGES)
    message.normalizer_spec.remove_extra_whitespaces = True
    message.self_test_data.samples.add(input="a", expected="▁a")
    plain = Tokenizer.from_sentence_pieces(model_file(tmp_path))
    path = tmp_path / "theirs.model"
    path.write_bytes(message.SerializeToString())
    assert Tokenizer.from_sentence_pieces(path).fingerprint == plain.fingerprint


def test_text_comes_back_and_no_text_becomes_a_special_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_sentence_pieces(model_file(tmp_path))
    for text in ("red stars, a star", "a red star's", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, *ids, tokenizer.pad]) == text
    for text in TEXTS:
        assert not np.isin(tokenizer.encode(text), np.setdiff1d(tokenizer.specials, [tokenizer.unk])).any(), text
    assert tokenizer.encode("a star", limit=1).tolist() == tokenizer.encode("a").tolist()
    tokenizer.save(tmp_path)
    for copy in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert [copy.encode(text).tolist() for text in TEXTS] == [tokenizer.encode(text).tolist() for text in TEXTS]


def test_words_of_several_pieces(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_sentence_pieces(model_file(tmp_path))
    for text, words in (("red stars", [0, 1, 1]), ("stars, a", [0, 0, 1, 2]), ("red's", [0, 1, 2]),
                        ("rrr red", [0, 0, 0, 0, 1]), ("xa s", [0, 1, 2, 3, 3])):
        ids = tokenizer.encode(text)
        assert tokenizer.words_of(ids).tolist() == words, names(tokenizer, text)
    ids = tokenizer.encode("stars")
    assert tokenizer.words_of(np.array([tokenizer.cls, *ids, tokenizer.mask, *ids[1:], tokenizer.sep])).tolist() == [
        0, 1, 1, 2, 3, 4]


def test_pieces_that_are_not_from_text_keep_their_ids(tmp_path: Path) -> None:
    """Control and unused pieces, and names that XLM-R has elsewhere; what a user named is scored by its length."""
    pieces = [*FIRST, ("<pad>", 0.0, 3), ("<mask>", 0.0, 4), ("re", 0.0, 5), ("xy", 0.0, 4), ("▁as", 0.0, 4),
              *PIECES[:7], *PIECES[8:]]
    tokenizer = Tokenizer.from_sentence_pieces(model_file(tmp_path, pieces))
    assert tokenizer.size == len(pieces) + 2 and (tokenizer.pad, tokenizer.mask) == (1, len(pieces) + 1)
    found = names(tokenizer, "re axys [unused 5]")
    assert found[:6] == ["▁", "r", "e", "▁a", "xy", "s"] and tokenizer.encode("axy")[1] == 7
    assert names(tokenizer, "as") == ["▁a", "s"], "5 bytes of the best score are less than two good pieces"
    assert not any("unused" in name for name in found) and tokenizer.ordinary[:2].tolist() == [7, 8]


def test_blanks_are_treated_as_the_file_says(tmp_path: Path) -> None:
    for rules, expected in ((b"", ["▁red", "▁red"]), (field(3, 0), ["re", "d", "▁red"]),
                            (field(4, 0), ["▁red", "▁", "▁red"])):
        assert names(Tokenizer.from_sentence_pieces(model_file(tmp_path, rules=rules)), " red  red") == expected


@pytest.mark.parametrize(("change", "message"), [
    (lambda content: content[:-3], "cut short"), (lambda content: b"", "first pieces are not"),
    (lambda content: content[:40], ""), (lambda content: b"\xff" * 90, "does not end"), (lambda content: b"PK\3\4", ""),
    (lambda content: content + field(1, field(1, "▁red")), "stands there twice"),
    (lambda content: content + field(1, field(1, "x") + field(2, math.nan)), "score nan"),
    (lambda content: content + field(1, field(2, -1.0)), "a piece ''"),
    (lambda content: content + field(1, 7), "number"),
    (lambda content: content + field(1, field(1, b"\xff")), "decode"),
    (lambda content: content + field(2, field(3, 2)), "merges pairs"),
    (lambda content: content + field(2, field(35, 1)), "into bytes"),
    (lambda content: content + field(2, field(24, 1)), "behind words"),
    (lambda content: content + field(3, field(5, 0)), "leaves blanks"),
    (lambda content: content[40:], "first pieces are not|kind|cut short"),
])
def test_damaged_and_other_files_are_named(tmp_path: Path, change: Any, message: str) -> None:
    path = model_file(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"tiny.spm is no unigram model of SentencePiece \(.*({message})"):
        Tokenizer.from_sentence_pieces(path)


def test_a_damaged_table_of_characters_is_refused_and_not_run(tmp_path: Path) -> None:
    """The library ends the program where such a table leads out of itself; any single byte may be wrong."""
    whole, rng = charsmap({"ｒ": "r", "é": "é"}), np.random.default_rng(0)
    texts = ["ｒed é", *("".join(map(chr, rng.integers(1, 0x3000, 20))) for _ in range(20))]
    refused = 0
    for place in [*range(12), *rng.integers(len(whole), size=100).tolist(), *range(len(whole) - 5, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        try:
            tokenizer = Tokenizer.from_sentence_pieces(model_file(tmp_path, rules=field(2, bytes(damaged))))
        except UserError:
            refused += 1
            continue
        for text in texts:
            tokenizer.encode(text)
    assert refused >= 3
    far, two = struct.pack("<257I", 1024, 1 << 20, *[0] * 255), charsmap({"a": "b", "c": "é"})
    within = two.replace(struct.pack("<I", 2 | 1 << 31), struct.pack("<I", 3 | 1 << 31))
    for table, message in ((far, "out of itself"), (two[:-4], "beside its texts"), (within, "beside its texts"),
                           (two[:-2], "decode"), (two[:99], "cut short"), (two[:3], "buffer")):
        with pytest.raises(UserError, match=message):
            Tokenizer.from_sentence_pieces(model_file(tmp_path, rules=field(2, table)))


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_file(tmp_path)
    assert Tokenizer.from_sentence_pieces(tmp_path).fingerprint == Tokenizer.from_sentence_pieces(path).fingerprint
    (tmp_path / "other.model").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="holds 2 files of SentencePiece"):
        Tokenizer.from_sentence_pieces(tmp_path)
    with pytest.raises(UserError, match=r"none.spm does not exist"):
        Tokenizer.from_sentence_pieces(tmp_path / "none.spm")
    monkeypatch.setattr(sentence_pieces, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="no file of SentencePiece has more than 100"):
        Tokenizer.from_sentence_pieces(path)
