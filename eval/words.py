"""Texts against texts: normalisers, edits between words or letters (word and character error rate), overlap of words.

A rate of errors is a sum of edits over a sum of lengths (corpus level), and nothing without its normaliser: the same
transcripts differ by several points between the three that are given here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

from opt.config import UserError, extra

NORMALISER = "lower-case, no punctuation, single spaces"
AS_WRITTEN = "none: as written, single spaces"
WHISPER_PACKAGE = "whisper-normalizer"
LONG_NUMBER = re.compile(r"([\d,.]{2000})(?=[\d,.])")
"""Where numbers are cut for Whisper's rules, which end with an error at one that Python does not convert: 4,300 digits.
"""


def normalise(text: str) -> str:
    """`text` in lower case, hyphens as spaces, every other punctuation mark or symbol dropped, single spaces."""
    spaced = re.sub(r"[-‐‑‒–—/]", " ", text.lower())
    kept = "".join(letter for letter in spaced if unicodedata.category(letter)[0] not in "PS")
    return " ".join(kept.split())


def as_written(text: str) -> str:
    """`text` with single spaces and nothing else changed."""
    return " ".join(text.split())


def whisper_normaliser() -> tuple[str, Callable[[str], str]]:
    """Whisper's English normaliser (Radford et al. 2022, appendix C) and what to call it in a result.

    The rules are those of transformers; the table of British spellings is OpenAI's, as the package whisper-normalizer
    carries it (that package's own rules have moved on from OpenAI's). Raises UserError where the package is missing.
    """
    if importlib.util.find_spec("whisper_normalizer") is None:
        raise UserError(f"Whisper's table of spellings is in {WHISPER_PACKAGE}, which is not here: {extra('eval')}")
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    table = importlib.resources.files("whisper_normalizer") / "normalizers" / "english.json"
    spellings = json.loads(table.read_text(encoding="utf-8"))
    rules = EnglishTextNormalizer(spellings)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", WHISPER_PACKAGE)]
    label = f"Whisper's English rules ({versions[0]}) with its {len(spellings):,} spellings ({versions[1]})"
    return label, lambda text: rules(LONG_NUMBER.sub(r"\1 ", text)).strip()


class Edit(NamedTuple):
    """One step from reference to hypothesis: `kind` is equal, replace, delete or insert; the absent word is ""."""

    kind: str
    reference: str
    hypothesis: str


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Edit]:
    """The fewest edits (Levenshtein over words) that turn `reference` into `hypothesis`, equal words included."""
    edits = []
    for step in Levenshtein.opcodes(reference, hypothesis):
        old, new = reference[step.src_start : step.src_end], hypothesis[step.dest_start : step.dest_end]
        length = max(len(old), len(new))
        edits += [
            Edit(step.tag, *pair)
            for pair in zip([*old, *[""] * (length - len(old))], [*new, *[""] * (length - len(new))], strict=True)
        ]
    return edits


def word_errors(reference: str, hypothesis: str) -> int:
    """Substitutions, deletions and insertions of words between two normalised texts."""
    return Levenshtein.distance(reference.split(), hypothesis.split())


def edit_kinds(reference: Sequence[str], hypothesis: Sequence[str]) -> Counter[str]:
    """How many of the fewest edits between words, or between letters, are of each kind: replace, delete, insert."""
    return Counter(step.tag for step in Levenshtein.editops(reference, hypothesis))


def word_f1(hypothesis: str, references: Sequence[str]) -> float:
    """Overlap of words (with their counts) between normalised texts, as F1 in [0, 1]; the best reference counts."""
    words = Counter(hypothesis.split())
    best = 0.0
    for reference in references:
        others = Counter(reference.split())
        total = words.total() + others.total()
        best = max(best, 2 * (words & others).total() / total if total else 0.0)
    return best
