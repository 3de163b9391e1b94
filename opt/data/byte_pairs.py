"""CLIP's byte-pairs (arXiv 2103.00020, section 2.4): a word's bytes, merged by frequency; its last piece ends in </w>.

    vocab.json and merges.txt | tokenizer.json | bpe_simple_vocab_16e6.txt.gz --read--> ids, merges --build--> pieces

Text is cleaned as transformers does it: composed characters (NFC), white space one blank, lower case. OpenAI's own code
mends more before (curly quotes, wide letters, HTML); on text without these the ids are the same.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from opt.config import UserError, read_json

END = "</w>"
"""What the last piece of a word ends in."""
BEGIN_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"
MERGES = 49_152 - 256 - 2
"""OpenAI's file holds more merges than CLIP uses."""
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What is cut into pieces by itself: an English ending, letters, a digit, other marks."""

Merges = list[tuple[str, str]]


def build(vocabulary: dict[str, int], merges: Merges) -> Tokenizer:
    """CLIP's byte-pairs over `vocabulary`, tokens with their ids; earlier merges go first. Raises ValueError where a
    merge needs a token that is not there."""
    try:
        model = models.BPE(vocabulary, merges, end_of_word_suffix=END, unk_token=END_TEXT)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(str(error)) from error
    pieces = Tokenizer(model)
    pieces.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    pieces.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    pieces.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(END, " ")])
    return pieces


def read(path: Path) -> Tokenizer:
    """From a folder that holds one of the three layouts, or one of its files. Raises UserError for anything else."""
    if path.is_dir():
        names = ("vocab.json", "tokenizer.json", "bpe_simple_vocab_16e6.txt.gz")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path} holds no byte-pairs of CLIP: expected vocab.json and merges.txt, tokenizer.json, "
                            "or bpe_simple_vocab_16e6.txt.gz")
        path = found
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected the byte-pairs of a CLIP")
    try:
        if path.suffix == ".gz":
            return build(*_openai(path))
        definition = read_json(path)
        vocabulary, merges = (_transformers(definition) if isinstance(definition.get("model"), dict)  # else a token
                              else (definition, _merges(path.with_name("merges.txt").read_bytes())))
        if sorted(vocabulary.values()) != [*range(len(vocabulary))] or not {BEGIN_TEXT, END_TEXT} <= set(vocabulary):
            raise ValueError(f"it must number its tokens 0, 1, 2, ..., with {BEGIN_TEXT} and {END_TEXT} among them")
        return build(vocabulary, merges)
    except (KeyError, TypeError, ValueError, AttributeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} holds no byte-pairs of CLIP ({error}); copy its folder anew") from error


def _openai(path: Path) -> tuple[dict[str, int], Merges]:
    """OpenAI's own file: merges alone; ids follow from their order."""
    with gzip.open(path) as file:
        merges = _merges(file.read())[:MERGES]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + END for letter in letters), *(left + right for left, right in merges)]
    return {token: number for number, token in enumerate([*tokens, BEGIN_TEXT, END_TEXT])}, merges


def _transformers(definition: dict[str, Any]) -> tuple[dict[str, int], Merges]:
    """tokenizer.json: the model, and tokens that were added to it."""
    model = definition["model"]
    if model["type"] != "BPE" or model.get("end_of_word_suffix") != END:
        raise ValueError(f"it must hold byte-pairs whose words end in {END}")
    added = {token["content"]: token["id"] for token in definition.get("added_tokens") or ()}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    return {**model["vocab"], **added}, [_pair(merge) for merge in merges]


def _merges(content: bytes) -> Merges:
    """A line of the version, then two pieces a line."""
    lines = content.decode("utf-8").strip("\n").split("\n")[1:]
    if not lines:
        raise ValueError("it is empty")
    return [_pair(tuple(line.split())) for line in lines]


def _pair(merge: tuple[str, ...]) -> tuple[str, str]:
    if len(merge) != 2:
        raise ValueError(f"a merge of {len(merge)} pieces: {' '.join(merge)[:40]!r}")
    return merge[0], merge[1]
