"""Tokenizer: text -> ids and back. One face over BERT's WordPiece, CLIP's byte-pairs and SentencePiece.

    captions --train--> | a BERT's files --from_vocab, from_bert, from_blip--> | a CLIP's --from_clip--> Tokenizer
                                                       | a BEiT-3's or XLM-R's --from_sentence_pieces--> Tokenizer

It travels with a checkpoint as `tokenizer.json`, which the `tokenizers` and `transformers` libraries read too. Special
tokens are named here and nowhere else, and asked for by their role; a text that spells one out ("[MASK]") is split into
ordinary pieces and never becomes one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models

from opt.config import UserError
from opt.data import byte_pairs, sentence_pieces, word_pieces
from opt.files import write_atomic

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")
"""What a vocabulary of WordPiece has; trained ones begin with them."""
BLIP_SPECIALS = (*SPECIALS[:5], "[DEC]", "[ENC]")
"""The same for BLIP, whose texts end with [SEP]."""
ROLES = {
    "pad": ("[PAD]", byte_pairs.END_TEXT, sentence_pieces.PAD),
    "unk": ("[UNK]", byte_pairs.END_TEXT, sentence_pieces.UNKNOWN),
    "cls": ("[CLS]", sentence_pieces.BEGIN),
    "sep": ("[SEP]", sentence_pieces.END),
    "mask": ("[MASK]", sentence_pieces.MASK),
    "bos": ("[BOS]", "[DEC]", byte_pairs.BEGIN_TEXT, sentence_pieces.BEGIN),
    "eos": ("[EOS]", "[SEP]", byte_pairs.END_TEXT, sentence_pieces.END),
    "enc": ("[ENC]", "[MASK]", sentence_pieces.MASK),
}
"""What special tokens are for, and which token that is: the first that the vocabulary has."""
NAMES = frozenset(name for names in ROLES.values() for name in names)
NEEDED = ("pad", "unk", "bos", "eos")
"""Roles that every tokenizer fills."""
FILE = "tokenizer.json"

JOINS = [
    (re.compile(r" ([,.!?;:)\]}%…])"), r"\1"),
    (re.compile(r"([(\[{$#]) "), r"\1"),
    (re.compile(r"(\w) ' ?(s|t|m|d|re|ve|ll)\b"), r"\1'\2"),
    (re.compile(r"(\w) ([-/]) (?=\w)"), r"\1\2"),
    (re.compile(r'" (.*?) "'), r'"\1"'),
]
"""How words and punctuation marks close up in running text."""


class Tokenizer:
    """Made by `train`, `load`, or one of the readers of published files. Picklable."""

    def __init__(self, pieces: tokenizers.Tokenizer) -> None:
        self._pieces = pieces
        for role in NEEDED:
            self._role(role)

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> Tokenizer:
        """WordPiece of at most `size` tokens, the same for the same captions in any order.

        A word that occurs twice is one token, if `size` allows; small corpora give fewer than `size` tokens. Raises
        UserError when there are no captions, or not even their characters fit.
        """
        return cls(word_pieces.learn(captions, size, SPECIALS))

    @classmethod
    def from_vocab(cls, path: Path) -> Tokenizer:
        """From a BERT `vocab.txt`, one token a line, the line's number its id.

        Text is lower-cased and loses its accents, or stays as it is, by `do_lower_case` of the tokenizer_config.json
        beside the file; without one it stays as it is when any line holds an upper-case letter outside [brackets].
        Special tokens that the file lacks ([BOS] and [EOS] in BERT's own) are appended after the last id.
        """
        return cls._from_word_pieces(path, SPECIALS)

    @classmethod
    def from_bert(cls, path: Path) -> Tokenizer:
        """From a BERT's folder, or its file: vocab.txt, or the tokenizer.json that newer ones have instead."""
        return cls._from_word_pieces(_bert_file(path), SPECIALS)

    @classmethod
    def from_blip(cls, path: Path) -> Tokenizer:
        """From a BLIP's folder or file, or a BERT's; [DEC] and [ENC] are appended where it lacks them."""
        return cls._from_word_pieces(_bert_file(path), BLIP_SPECIALS)

    @classmethod
    def from_clip(cls, path: Path) -> Tokenizer:
        """From a CLIP's folder, or one of its files: vocab.json (merges.txt beside it), tokenizer.json, or OpenAI's
        bpe_simple_vocab_16e6.txt.gz. Raises UserError for anything else."""
        return cls(byte_pairs.read(path))

    @classmethod
    def from_sentence_pieces(cls, path: Path) -> Tokenizer:
        """From a BEiT-3's or XLM-R's .spm or .model, or the folder that holds it, with the ids those models give its
        pieces. Raises UserError for anything else."""
        return cls(sentence_pieces.read(path))

    @classmethod
    def _from_word_pieces(cls, path: Path, specials: tuple[str, ...]) -> Tokenizer:
        tokens, lower_case = word_pieces.read(path)
        return cls(word_pieces.build([*tokens, *(name for name in specials if name not in tokens)], lower_case))

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
        """Ids int64 (L,) without special tokens (but that of `unk`); the first `limit` of them."""
        return np.array(self._pieces.encode(text, add_special_tokens=False).ids[:limit], np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Running text up to the first token of `eos`: special tokens left out, pieces and punctuation joined."""
        tokens: list[str] = []
        for number in ids:
            if number == self.eos:
                break
            token = self._pieces.id_to_token(int(number))
            if token is not None and token not in NAMES:
                tokens.append(token)
        text = self._pieces.decoder.decode(tokens).strip()
        if self._is_word_pieces:  # the first may be the rest of a word
            text = text.removeprefix(word_pieces.INNER)
        for pattern, joined in JOINS:
            text = pattern.sub(joined, text)
        return text

    def words_of(self, ids: np.ndarray) -> np.ndarray:
        """Which word, counted from 0, each of `ids` (L,) belongs to: int64 (L,). A mark or special token is one too."""
        begins = np.ones(len(ids), np.int64)
        begins[1:] = self._begins_word[ids[1:]] | self._ends_word[ids[:-1]]
        return np.cumsum(begins) - 1

    @cached_property
    def size(self) -> int:
        """How many ids there are."""
        return self._pieces.get_vocab_size()

    @cached_property
    def ordinary(self) -> np.ndarray:
        """Ids that may stand in for a word, int64: all but special tokens and placeholders such as [unused7]."""
        special = re.compile(r"\[[\w ]+\]|<\|\w+\|>|" + "|".join(map(re.escape, sorted(NAMES))))
        return np.array([number for number, token in enumerate(self._tokens) if not special.fullmatch(token)])

    @cached_property
    def specials(self) -> np.ndarray:
        """Ids of the tokens that have a role, int64, in order."""
        vocabulary = self._pieces.get_vocab()
        return np.array(sorted(vocabulary[name] for name in NAMES if name in vocabulary))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's definition."""
        return hashlib.sha256(self._pieces.to_str().encode()).hexdigest()

    @cached_property
    def pad(self) -> int:
        return self._role("pad")

    @cached_property
    def unk(self) -> int:
        return self._role("unk")

    @cached_property
    def cls(self) -> int:
        """What an encoder's text begins with."""
        return self._role("cls")

    @cached_property
    def sep(self) -> int:
        """What an encoder's text ends with."""
        return self._role("sep")

    @cached_property
    def mask(self) -> int:
        return self._role("mask")

    @cached_property
    def bos(self) -> int:
        """What a decoder begins with."""
        return self._role("bos")

    @cached_property
    def eos(self) -> int:
        """What a decoder ends with."""
        return self._role("eos")

    @cached_property
    def enc(self) -> int:
        """What a text begins with that is read together with a picture (BLIP)."""
        return self._role("enc")

    def _role(self, role: str) -> int:
        """The token for it. Raises UserError where the vocabulary has none."""
        for name in ROLES[role]:
            if (number := self._pieces.token_to_id(name)) is not None:
                return number
        raise UserError(f"the tokenizer has no token for {role} ({' or '.join(ROLES[role])}); choose words that have "
                        "it: a vocabulary trained on captions, or a BERT's")

    @cached_property
    def _is_word_pieces(self) -> bool:
        return isinstance(self._pieces.model, models.WordPiece)

    @cached_property
    def _is_sentence_pieces(self) -> bool:
        return isinstance(self._pieces.model, models.Unigram)

    @cached_property
    def _tokens(self) -> list[str]:
        """In the order of their ids."""
        vocabulary = self._pieces.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    @cached_property
    def _begins_word(self) -> np.ndarray:
        """bool (size,): whether a token begins a word, whatever stands before it."""
        if self._is_word_pieces:
            return np.array([not token.startswith(word_pieces.INNER) for token in self._tokens])
        if self._is_sentence_pieces:
            return np.array([token.startswith(sentence_pieces.BLANK) or self._is_mark(token) for token in self._tokens])
        return np.array([token in NAMES for token in self._tokens])

    @cached_property
    def _ends_word(self) -> np.ndarray:
        """bool (size,): whether what stands behind a token is another word, whatever it is."""
        if self._is_word_pieces:
            return np.zeros(self.size, bool)
        if self._is_sentence_pieces:
            return np.array([token != sentence_pieces.BLANK and self._is_mark(token) for token in self._tokens])
        return np.array([token in NAMES or token.endswith(byte_pairs.END) for token in self._tokens])

    @staticmethod
    def _is_mark(token: str) -> bool:
        """Whether a piece is a special token, or has neither letter nor digit."""
        return token in NAMES or not any(letter.isalnum() for letter in token)


def _bert_file(path: Path) -> Path:
    """`path`, or the file of that folder that holds a BERT's words."""
    if path.is_file():
        return path
    words, definition = path / "vocab.txt", path / FILE
    return definition if definition.is_file() and not words.is_file() else words
