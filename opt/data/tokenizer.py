"""Tokenizer: text -> ids and back. WordPiece over words and punctuation marks, as BERT has it.

The vocabulary is trained on captions (lower-case) or read from a BERT's files (in lower case without accents, or
cased, as they are); it travels with a checkpoint as `tokenizer.json`, which the `tokenizers` and `transformers`
libraries read too. Special tokens are named here and nowhere else; a text
that spells one out ("[MASK]") is split into ordinary pieces and never becomes one.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from opt.config import UserError, read_json
from opt.files import write_atomic

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")
FILE = "tokenizer.json"

JOINS = [
    (re.compile(r" ([,.!?;:)\]}%…])"), r"\1"),
    (re.compile(r"([(\[{$#]) "), r"\1"),
    (re.compile(r"(\w) ' (s|t|m|d|re|ve|ll)\b"), r"\1'\2"),
    (re.compile(r"(\w) ([-/]) (?=\w)"), r"\1\2"),
    (re.compile(r'" (.*?) "'), r'"\1"'),
]
"""How words and punctuation marks close up in running text."""


class Tokenizer:
    """Made by `train`, `from_vocab`, `from_bert` or `load`. Picklable."""

    def __init__(self, pieces: tokenizers.Tokenizer) -> None:
        self._pieces = pieces
        missing = [name for name in SPECIALS if pieces.token_to_id(name) is None]
        if missing:
            raise UserError(f"the tokenizer lacks the special token {missing[0]}; it must have {' '.join(SPECIALS)}")

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> Tokenizer:
        """A vocabulary of at most `size` tokens, the same for the same captions in any order.

        Specials come first, then every character that occurs, then pieces merged by frequency until no pair occurs
        twice. So a word that occurs twice is one token, if `size` allows; small corpora give fewer than `size` tokens.
        Raises UserError when there are no captions, or not even the characters fit.
        """
        empty = _bert([*SPECIALS])
        words = Counter(word for caption in captions for word in _words(empty, caption))
        if not words:
            raise UserError("no captions to make a vocabulary from; give a vocabulary file instead")
        begins = sorted({word[0] for word in words})
        inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
        fixed = [*SPECIALS, *dict.fromkeys([*begins, *sorted({piece[2:] for piece in inner} - {*begins}), *inner])]
        if len(fixed) > size:
            raise UserError(f"a vocabulary of {size} tokens does not hold the {len(fixed)} characters of the captions")
        # The trainer breaks ties between pairs by the ids of their pieces, and numbers inner pieces in the random order
        # of a hash table. Given as "special tokens" they get fixed ids; only the vocabulary is kept of what it makes.
        learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=fixed, show_progress=False)
        learner.train_from_iterator(_repeat(words), trainer)
        vocabulary = learner.get_vocab()
        return cls(_bert(sorted(vocabulary, key=vocabulary.__getitem__)))

    @classmethod
    def from_vocab(cls, path: Path) -> Tokenizer:
        """From a BERT `vocab.txt`, one token a line, the line's number its id.

        Text is lower-cased and loses its accents, or stays as it is, by `do_lower_case` of the tokenizer_config.json
        beside the file; without one it stays as it is when any line holds an upper-case letter outside [brackets].
        Special tokens that the file lacks ([BOS] and [EOS] in BERT's own) are appended after the last id.
        """
        if not path.is_file():
            raise UserError(f"{path} does not exist; expected a vocab.txt with one token a line")
        try:
            lines = [line.rstrip("\r") for line in path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")]
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not text ({error}); expected a vocab.txt with one token a line") from error
        repeated = [token for token, count in Counter(lines).items() if count > 1]
        if repeated:
            raise UserError(f"{path}: token {repeated[0]!r} stands there twice; each line must be another token")
        return cls._from_tokens(lines, _lower_case(path, lines), path)

    @classmethod
    def from_bert(cls, folder: Path) -> Tokenizer:
        """From a BERT's folder: its vocab.txt, or the tokenizer.json that newer ones have instead."""
        path = folder / FILE
        if (folder / "vocab.txt").is_file() or not path.is_file():
            return cls.from_vocab(folder / "vocab.txt")
        definition = read_json(path)
        try:
            vocabulary, normalizer = definition["model"]["vocab"], definition["normalizer"]
            tokens = sorted(vocabulary, key=vocabulary.__getitem__)
            if definition["model"]["type"] != "WordPiece" or sorted(vocabulary.values()) != [*range(len(tokens))]:
                raise ValueError("it must hold WordPiece with ids 0, 1, 2, ...")
            lower = _normalizer(normalizer["lowercase"], normalizer["strip_accents"],
                                normalizer["handle_chinese_chars"], path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is no tokenizer of BERT's form ({error}); give one with a vocab.txt") from error
        return cls._from_tokens(tokens, lower, path)

    @classmethod
    def _from_tokens(cls, tokens: list[str], lower_case: bool, path: Path) -> Tokenizer:
        if "[UNK]" not in tokens or not {*tokens} - {*SPECIALS, ""}:
            raise UserError(f"{path} is no vocabulary of BERT's form: it needs a line [UNK], and lines of words")
        return cls(_bert([*tokens, *(name for name in SPECIALS if name not in tokens)], lower_case))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """What `save` wrote into `folder`."""
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"{path} does not exist; expected a folder that an earlier run saved its tokenizer in")
        try:
            pieces = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"{path} is damaged ({error}); copy the folder anew") from error
        return cls(pieces)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into an existing folder."""
        write_atomic(folder / FILE, self._pieces.to_str(pretty=True).encode())

    def encode(self, text: str, limit: int | None = None) -> np.ndarray:
        """Ids int64 (L,) without special tokens (but [UNK]); the first `limit` of them."""
        return np.array(self._pieces.encode(text, add_special_tokens=False).ids[:limit], np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Running text up to the first [EOS]: special tokens left out, pieces and punctuation joined."""
        tokens: list[str] = []
        for number in ids:
            if number == self.eos:
                break
            token = self._pieces.id_to_token(int(number))
            if token is not None and token not in SPECIALS:
                tokens.append(token)
        text = " ".join(tokens).replace(" ##", "").removeprefix("##")
        for pattern, joined in JOINS:
            text = pattern.sub(joined, text)
        return text

    @cached_property
    def size(self) -> int:
        """How many ids there are."""
        return self._pieces.get_vocab_size()

    @cached_property
    def ordinary(self) -> np.ndarray:
        """Ids that may stand in for a word, int64: all but special tokens and placeholders such as [unused7]."""
        vocabulary = self._pieces.get_vocab()
        return np.array(sorted(number for token, number in vocabulary.items() if not re.fullmatch(r"\[\w+\]", token)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's definition."""
        return hashlib.sha256(self._pieces.to_str().encode()).hexdigest()

    @cached_property
    def pad(self) -> int:
        return self._special("[PAD]")

    @cached_property
    def unk(self) -> int:
        return self._special("[UNK]")

    @cached_property
    def cls(self) -> int:
        return self._special("[CLS]")

    @cached_property
    def sep(self) -> int:
        return self._special("[SEP]")

    @cached_property
    def mask(self) -> int:
        return self._special("[MASK]")

    @cached_property
    def bos(self) -> int:
        """What a decoder begins with."""
        return self._special("[BOS]")

    @cached_property
    def eos(self) -> int:
        """What a decoder ends with."""
        return self._special("[EOS]")

    def _special(self, name: str) -> int:
        number = self._pieces.token_to_id(name)
        assert number is not None  # checked when the tokenizer was made
        return number


def _bert(tokens: list[str], lower_case: bool = True) -> tokenizers.Tokenizer:
    """BERT's WordPiece over the given tokens, a token's place its id. lower_case: accents go too."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pieces = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece(cleanup=False)
    return pieces


def _lower_case(path: Path, tokens: list[str]) -> bool:
    """Whether a vocab.txt is meant for lower-cased text (the rule of `from_vocab`)."""
    beside = path.with_name("tokenizer_config.json")
    settings = read_json(beside) if beside.is_file() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{beside} is damaged, it holds no names with values; delete it or put back a whole one")
    lower = settings.get("do_lower_case")
    if lower is None:
        lower = all(token == token.lower() or re.fullmatch(r"\[.+\]", token) for token in tokens)
    return _normalizer(lower, settings.get("strip_accents"), settings.get("tokenize_chinese_chars"), beside)


def _normalizer(lower_case: Any, strip_accents: Any, chinese: Any, path: Path) -> bool:
    """`lower_case`, where the other two settings are BERT's own. Raises UserError where they are not."""
    if not isinstance(lower_case, bool) or strip_accents not in (None, lower_case) or chinese not in (None, True):
        raise UserError(
            f"{path}: lower case {lower_case}, without accents {strip_accents}, Chinese characters apart {chinese}; "
            "words are read as BERT's own models do: the first two both or neither, and the third; choose such a model"
        )
    return lower_case


def _words(pieces: tokenizers.Tokenizer, text: str) -> list[str]:
    """The text's words and punctuation marks before they are cut into pieces."""
    return [word for word, _ in pieces.pre_tokenizer.pre_tokenize_str(pieces.normalizer.normalize_str(text))]


def _repeat(words: Counter[str]) -> Iterator[str]:
    """Each word as often as it occurs, in lines of at most 10,000."""
    for word, count in words.items():
        for done in range(0, count, 10_000):
            yield " ".join([word] * min(10_000, count - done))
