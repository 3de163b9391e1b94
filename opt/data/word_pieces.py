"""WordPiece over words and punctuation marks, as BERT has it: learned from captions, or read from a BERT's files.

    captions --learn--> pieces          vocab.txt | tokenizer.json --read--> tokens, lower case or not --build--> pieces
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from opt.config import UserError, read_json

INNER = "##"
"""What a piece that goes on with a word begins with."""


def build(tokens: Sequence[str], lower_case: bool = True) -> Tokenizer:
    """BERT's WordPiece over the given tokens, a token's place its id. lower_case: accents go too."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece(cleanup=False)
    return pieces


def learn(captions: Iterable[str], size: int, specials: Sequence[str]) -> Tokenizer:
    """A vocabulary of at most `size` tokens, the same for the same captions in any order.

    Specials come first, then every character that occurs, then pieces merged by frequency until no pair occurs twice.
    Raises UserError when there are no captions, or not even the characters fit.
    """
    empty = build(specials)
    words = Counter(word for caption in captions for word in _words(empty, caption))
    if not words:
        raise UserError("no captions to make a vocabulary from; give a vocabulary file instead")
    begins = sorted({word[0] for word in words})
    inner = sorted({f"{INNER}{letter}" for word in words for letter in word[1:]})
    fixed = [*specials, *dict.fromkeys([*begins, *sorted({piece[2:] for piece in inner} - {*begins}), *inner])]
    if len(fixed) > size:
        raise UserError(f"a vocabulary of {size} tokens does not hold the {len(fixed)} characters of the captions")
    # The trainer breaks ties between pairs by the ids of their pieces, and numbers inner pieces in the random order
    # of a hash table. Given as "special tokens" they get fixed ids; only the vocabulary is kept of what it makes.
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=fixed, show_progress=False)
    learner.train_from_iterator(_repeat(words), trainer)
    vocabulary = learner.get_vocab()
    return build(sorted(vocabulary, key=vocabulary.__getitem__))


def read(path: Path) -> tuple[list[str], bool]:
    """Tokens of a vocab.txt or tokenizer.json in the order of their ids, and whether text is lower-cased.

    Raises UserError for a file that holds no WordPiece, or one that reads words otherwise than BERT's own models do.
    """
    tokens, lower_case = _read_json(path) if path.suffix == ".json" else _read_lines(path)
    if "[UNK]" not in tokens or not any(token and not re.fullmatch(r"\[\w+\]", token) for token in tokens):
        raise UserError(f"{path} is no vocabulary of BERT's form: it needs a line [UNK], and lines of words")
    return tokens, lower_case


def _read_lines(path: Path) -> tuple[list[str], bool]:
    """A vocab.txt: one token a line, the line's number its id."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a vocab.txt with one token a line")
    try:
        lines = [line.rstrip("\r") for line in path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text ({error}); expected a vocab.txt with one token a line") from error
    repeated = [token for token, count in Counter(lines).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: token {repeated[0]!r} stands there twice; each line must be another token")
    return lines, _lower_case(path, lines)


def _read_json(path: Path) -> tuple[list[str], bool]:
    """A tokenizer.json as the `tokenizers` library writes it."""
    definition = read_json(path)
    try:
        vocabulary, normalizer = definition["model"]["vocab"], definition["normalizer"]
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        if definition["model"]["type"] != "WordPiece" or sorted(vocabulary.values()) != [*range(len(tokens))]:
            raise ValueError("it must hold WordPiece with ids 0, 1, 2, ...")
        return tokens, _normalizer(normalizer["lowercase"], normalizer["strip_accents"],
                                   normalizer["handle_chinese_chars"], path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no tokenizer of BERT's form ({error}); give one with a vocab.txt") from error


def _lower_case(path: Path, tokens: list[str]) -> bool:
    """Whether a vocab.txt is meant for lower-cased text: by `do_lower_case` of the tokenizer_config.json beside it,
    else when no line holds an upper-case letter outside [brackets]."""
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


def _words(pieces: Tokenizer, text: str) -> list[str]:
    """The text's words and punctuation marks before they are cut into pieces."""
    return [word for word, _ in pieces.pre_tokenizer.pre_tokenize_str(pieces.normalizer.normalize_str(text))]


def _repeat(words: Counter[str]) -> Iterator[str]:
    """Each word as often as it occurs, in lines of at most 10,000."""
    for word, count in words.items():
        for done in range(0, count, 10_000):
            yield " ".join([word] * min(10_000, count - done))
