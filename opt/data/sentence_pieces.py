"""SentencePiece's unigram model (arXiv 1808.06226; 1804.10959): of all ways to cut a text, the likeliest.

    .model, .spm  --the few fields of its protobuf--> pieces with scores, normaliser --build--> pieces
    ids           <s> <pad> </s> <unk>, the file's pieces behind its own first three, <mask>: as XLM-R and BEiT-3 count

Blanks belong to the words behind them, as ▁. What is not from text (control and unused pieces) keeps its id under a
name that no text has.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from opt.config import UserError

BLANK = "▁"
"""What stands for a blank, and begins a word."""
BEGIN, PAD, END, UNKNOWN, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
FIRST = (UNKNOWN, BEGIN, END)
"""What every file begins with."""
SUFFIXES = (".spm", ".model")
MOST_BYTES = 64 * 2**20
"""The largest published files, of 250,000 pieces, have 5 MB."""

NORMAL, USER_DEFINED = 1, 4
"""Types of pieces that a text may become. Others: 2 unknown, 3 control, 5 unused, 6 byte."""
UNIGRAM = 1
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""How a field of a protobuf is written."""


@dataclass(frozen=True)
class Model:
    """What a file says. pieces: text, score, type. charsmap: how characters are replaced; empty: not at all."""

    pieces: list[tuple[str, float, int]]
    charsmap: bytes
    begins_with_blank: bool
    joins_blanks: bool


def read(path: Path) -> Tokenizer:
    """From a .model or .spm, or a folder with one of them. Raises UserError for anything else."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if len(found) != 1:
            raise UserError(f"{path} holds {len(found)} files of SentencePiece ({' or '.join(SUFFIXES)}); name the one "
                            "that the weights were trained with")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a file of SentencePiece, such as beit3.spm")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, no file of SentencePiece has more than "
                        f"{MOST_BYTES:,}; give one")
    try:
        return build(_model(path.read_bytes()))
    except (ValueError, struct.error) as error:
        raise UserError(f"{path} is no unigram model of SentencePiece ({error}); copy it anew, or give that of a "
                        "BEiT-3 or XLM-R") from error


def build(model: Model) -> Tokenizer:
    """The same in the library's terms. Raises ValueError where the pieces are not numbered as XLM-R's are."""
    if tuple(text for text, _, _ in model.pieces[:3]) != FIRST:
        raise ValueError(f"its first pieces are not {', '.join(FIRST)}")
    specials = (BEGIN, PAD, END, UNKNOWN)
    tokens = [*((name, 0.0) for name in specials), *_scored(model.pieces[3:]), (MASK, 0.0)]
    if len({text for text, _ in tokens}) != len(tokens):
        raise ValueError("a piece stands there twice")
    pieces = Tokenizer(models.Unigram(tokens, unk_id=specials.index(UNKNOWN), byte_fallback=False))
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(_checked(model.charsmap)))
    if model.joins_blanks:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    pieces.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.begins_with_blank else "never"
    spelled = "|".join(name[1:-1] for name in (*specials, MASK))
    pieces.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(BLANK, scheme, split=False),
        pre_tokenizers.Split(Regex(f"(?<=<(?:{spelled}))>"), "isolated")])  # a text that spells a special token out
    pieces.decoder = decoders.Metaspace(BLANK, scheme, split=False)
    return pieces


def _scored(pieces: list[tuple[str, float, int]]) -> Iterator[tuple[str, float]]:
    """Pieces of the vocabulary. What a user named has the best score, by its bytes, as in SentencePiece."""
    best = max((score for _, score, kind in pieces if kind == NORMAL), default=0.0)
    for number, (text, score, kind) in enumerate(pieces, start=len(FIRST)):
        if kind not in (NORMAL, USER_DEFINED) or text in (PAD, MASK):
            yield f"[unused {number}]", 0.0  # with a blank, which no text has when it is cut
        else:
            yield text, score if kind == NORMAL else best * len(text.encode()) - 0.1


def _model(content: bytes) -> Model:
    """A file's fields. Raises ValueError, or struct.error, for anything but a unigram model."""
    pieces, trainer, normaliser = [], b"", b""
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
        elif number == 2:
            trainer = _bytes(value)
        elif number == 3:
            normaliser = _bytes(value)
    kinds, rules = dict(_fields(trainer)), dict(_fields(normaliser))
    if kinds.get(3, UNIGRAM) != UNIGRAM:
        raise ValueError("it merges pairs, or knows whole words or letters only")
    for what, field, fields in (("cuts unknown letters into bytes", 35, kinds), ("has blanks behind words", 24, kinds)):
        if fields.get(field, 0):
            raise ValueError(f"it {what}")
    if not rules.get(5, 1):
        raise ValueError("it leaves blanks as they are")
    return Model(pieces, _bytes(rules.get(2, b"")), bool(rules.get(3, 1)), bool(rules.get(4, 1)))


def _piece(content: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(content):
        if number == 1:
            text = _bytes(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3 and isinstance(value, int):
            kind = value
    if not text or not math.isfinite(score):
        raise ValueError(f"a piece {text!r} of score {score}")
    return text, score, kind


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text should be")
    return value


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers of a message's fields with their values, in the order of the file."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = _varint(content, place)
            yield number, value
            continue
        if kind not in (FIXED64, BYTES, FIXED32):
            raise ValueError(f"a field of kind {kind}")
        size = {FIXED64: 8, FIXED32: 4}.get(kind)
        if size is None:
            size, place = _varint(content, place)
        if place + size > len(content):
            raise ValueError("it is cut short")
        yield number, content[place : place + size]
        place += size


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, and where the next begins."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            raise ValueError("it is cut short")
        byte = content[place]
        value, place = value | (byte & 127) << shift, place + 1
        if byte < 128:
            return value, place
    raise ValueError("a number that does not end")


def _checked(charsmap: bytes) -> bytes:
    """The table itself, whose every way the library may walk: it would end the program where one leads out of it.

    Bytes of a trie, the trie (a double array of darts-clone), then what its leaves point into, texts that end in 0. A
    unit holds a letter (its low byte), where its children lie, and whether one of them is a leaf. Raises ValueError.
    """
    (size,) = struct.unpack_from("<I", charsmap)
    if size % 4 or not 0 < size <= len(charsmap) - 4:
        raise ValueError("its table of characters is cut short")
    texts = charsmap[4 + size :]
    texts.decode("utf-8")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    letters, known = np.arange(1, 256), np.zeros(len(units), bool)
    waiting = np.zeros(1, np.int64)
    while len(waiting):
        at, waiting = waiting[:4096], waiting[4096:]
        base = at ^ ((units[at] >> 10) << ((units[at] & 512) >> 6))
        children = base[:, None] ^ letters
        if children.max() >= len(units):
            raise ValueError("its table of characters leads out of itself")
        leaves = units[base[units[at] >> 8 & 1 == 1]] & 0x7FFFFFFF
        if any(leaf > len(texts) or b"\x80" <= texts[leaf : leaf + 1] < b"\xc0" for leaf in leaves):
            raise ValueError("its table of characters points beside its texts")
        found = np.unique(children[(units[children] & 0x800000FF) == letters])
        found = found[~known[found]]
        known[found] = True
        waiting = np.concatenate([waiting, found])
    return charsmap
