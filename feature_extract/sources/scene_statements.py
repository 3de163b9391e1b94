"""True and false statements about two spoken scenes, as NLVR2 has them: a sentence with four pairs of pictures.

    lines of <split>_scenes.jsonl --sixteen at a time--> what is counted in each --a kind--> (pictures, pictures) bool
        more       "there are more stars in the left picture"
        both       "both pictures show a red thing"
        one        "exactly one picture has a circle"
        together   "the two pictures together hold four squares"
        same       "both pictures have the same number of hearts"
    --> of each sentence two true pairs and two false ones

The sentence alone tells nothing: it is as often true as false. A single picture tells little: every pair has a twin
that differs in one of its pictures and in its answer. Where a kind allows it, the four pairs are two left pictures with
two right ones, each of which then stands in a true and in a false pair. Pure in the scenes, sixteen at a time: longer
splits begin with the same statements.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from feature_extract.sources.scene_captions import plural
from feature_extract.sources.scene_drawing import COLORS, SHAPES
from feature_extract.sources.scene_questions import HIDDEN_MOST, NUMBERS

BLOCK = 16
"""Scenes whose pictures meet."""
SENTENCES = 2
"""Of each kind, about the pictures of a block."""
TRIES = 40
"""Sentences drawn before a kind is given up for a block."""

Pairs = list[tuple[int, int]]
_SALT = 2


def state(scenes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The statements about a split's scenes, lines {"image_ids": [left, right], "question", "answers", "kind", "set"}.

    `set` names a sentence's four lines. A block of few scenes may allow no sentence of some kind.
    """
    return [line for first in range(0, len(scenes), BLOCK) for line in _block(scenes[first : first + BLOCK])]


def blind(lines: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """The most that can be right by the sentence alone, by sentence and left picture, by sentence and right picture."""
    shown = (lambda line: None, lambda line: line["image_ids"][0], lambda line: line["image_ids"][1])
    return tuple(_best_guess(lines, seen) for seen in shown)  # type: ignore[return-value]


def _best_guess(lines: Sequence[dict[str, Any]], seen: Callable[[dict[str, Any]], Any]) -> float:
    """Share of lines that the most frequent answer of each question and of what is `seen` gets right."""
    answers: dict[Any, Counter[str]] = defaultdict(Counter)
    for line in lines:
        answers[line["question"], seen(line)].update(line["answers"])
    return sum(max(counts.values()) for counts in answers.values()) / max(1, len(lines))


def _block(scenes: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The statements about some scenes, kind by kind."""
    names = [scene["image_id"] for scene in scenes]
    for place, (kind, sentences) in enumerate(KINDS.items()):
        rng = np.random.default_rng((zlib.crc32(names[0].encode()), _SALT, place))
        said = set[str]()
        for _ in range(TRIES):
            sentence, word, holds = sentences(rng)
            counts, clear = _counts(scenes, word)
            truth = holds(counts[:, None], counts[None, :])
            allowed = clear[:, None] & clear[None, :] & ~np.eye(len(scenes), dtype=bool)
            pairs = _four_pairs(truth & allowed, ~truth & allowed, rng)
            if sentence in said or not pairs:
                continue
            said.add(sentence)
            for left, right in pairs:
                yield {
                    "image_ids": [names[left], names[right]], "question": sentence,
                    "answers": ["true" if truth[left, right] else "false"], "kind": kind,
                    "set": f"{names[0]}-{kind}-{len(said)}",
                }  # fmt: skip
            if len(said) == SENTENCES:
                break


def _counts(scenes: Sequence[dict[str, Any]], word: str) -> tuple[np.ndarray, np.ndarray]:
    """How many things of a shape or color each scene has, int64 (n,); whether all of them can be seen, bool (n,)."""
    found = [[thing for thing in scene["objects"] if word in (thing["shape"], thing["color"])] for scene in scenes]
    clear = [all(thing["hidden"] <= HIDDEN_MOST for thing in things) for things in found]
    return np.array([len(things) for things in found]), np.array(clear, bool)


def _four_pairs(true: np.ndarray, false: np.ndarray, rng: np.random.Generator) -> Pairs:
    """Two true and two false pairs (left, right) out of bool (n, n) each, or none: crossed if possible, else twins."""
    order = rng.permutation(len(true))
    crossed = _crossed(true, false, order)
    if crossed:
        return crossed
    shared_left = _twins(true, false, order)
    shared_right = [(left, right) for right, left in _twins(true.T, false.T, rng.permutation(len(true)))]
    pairs = shared_left + shared_right
    return pairs if len(set(pairs)) == 4 else []


def _crossed(true: np.ndarray, false: np.ndarray, order: np.ndarray) -> Pairs:
    """Pictures a, b and c, d for which (a, c) and (b, d) are true, (a, d) and (b, c) false."""
    for number, a in enumerate(order):
        for b in order[number + 1 :]:
            one, other = order[(true[a] & false[b])[order]], order[(false[a] & true[b])[order]]
            if len(one) and len(other):
                c, d = one[0], other[0]
                return [(int(left), int(right)) for left, right in ((a, c), (b, d), (a, d), (b, c))]
    return []


def _twins(true: np.ndarray, false: np.ndarray, order: np.ndarray) -> Pairs:
    """A true pair and a false one with the same left picture."""
    for a in order:
        one, other = order[true[a][order]], order[false[a][order]]
        if len(one) and len(other):
            return [(int(a), int(one[0])), (int(a), int(other[0]))]
    return []


# ---- kinds: a drawn sentence, the shape or color that it counts, and what it says of the left and right counts -------

Holds = Callable[[np.ndarray, np.ndarray], np.ndarray]
Sentence = tuple[str, str, Holds]


def _word(rng: np.random.Generator) -> tuple[str, str, str]:
    """A shape or color: the word, one such thing with its article, several of them."""
    words = (*SHAPES, *COLORS)
    word = words[rng.integers(len(words))]
    noun, several = (word, plural(word)) if word in SHAPES else (f"{word} thing", f"{word} things")
    return word, f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}", several


def _more(rng: np.random.Generator) -> Sentence:
    word, _, several = _word(rng)
    if rng.random() < 0.5:
        return f"there are more {several} in the left picture", word, np.greater
    return f"there are more {several} in the right picture", word, np.less


def _both(rng: np.random.Generator) -> Sentence:
    word, one, _ = _word(rng)
    return f"both pictures show {one}", word, lambda left, right: (left > 0) & (right > 0)


def _one(rng: np.random.Generator) -> Sentence:
    word, one, _ = _word(rng)
    return f"exactly one picture has {one}", word, lambda left, right: (left > 0) ^ (right > 0)


def _together(rng: np.random.Generator) -> Sentence:
    word, _, several = _word(rng)
    number = int(rng.integers(2, len(NUMBERS)))
    return f"the two pictures together hold {NUMBERS[number]} {several}", word, lambda left, right: (
        left + right == number)  # fmt: skip


def _same(rng: np.random.Generator) -> Sentence:
    word, _, several = _word(rng)
    return f"both pictures have the same number of {several}", word, np.equal


KINDS: dict[str, Callable[[np.random.Generator], Sentence]] = {
    "more": _more, "both": _both, "one": _one, "together": _together, "same": _same,
}  # fmt: skip
