"""Questions about spoken scenes, from their truth alone: what an answer needs is in the picture and nowhere else.

    a line of <split>_scenes.jsonl --ask--> one question of each kind that has one right answer here
        color    "what color is the star?"          the only star
        shape    "what shape is the red thing?"     the only red thing
        count    "how many stars are there?"        none as often as other counts allow
        there    "is there a red star?"             yes as often as no; a no has its color or its shape from the scene
        ground   "what is behind the things?"

Pure in the image id: a folder of scenes gets the same questions whenever they are made. A blind guess is weak, since
colors, shapes and grounds are equally frequent; `blind` says how weak.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from feature_extract.sources.scene_captions import plural
from feature_extract.sources.scene_drawing import COLORS, SHAPES

HIDDEN_MOST = 0.4
"""Questions of color and shape ask about objects hidden no more than this."""


NUMBERS = ("none", "one", "two", "three", "four")
"""Answers of counts in words, which a vocabulary of captions can spell."""


def ask(scene: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions of one scene, as lines {"image_id", "question", "answers", "kind"}."""
    rng = np.random.default_rng((zlib.crc32(scene["image_id"].encode()), len(SHAPES)))
    objects = scene["objects"]
    asked = {
        "color": _attribute(objects, "shape", "color", rng),
        "shape": _attribute(objects, "color", "shape", rng),
        "count": _count(objects, rng),
        "there": _there(objects, rng),
        "ground": ("what is behind the things?", scene["ground"]),
    }
    return [{"image_id": scene["image_id"], "question": pair[0], "answers": [pair[1]], "kind": kind}
            for kind, pair in asked.items() if pair is not None]


def _attribute(
    objects: list[dict[str, Any]], known: str, asked: str, rng: np.random.Generator
) -> tuple[str, str] | None:
    """The color of the only object of its shape, or the shape of the only one of its color; None where none is."""
    times = Counter(thing[known] for thing in objects)
    alone = [thing for thing in objects if times[thing[known]] == 1 and thing["hidden"] <= HIDDEN_MOST]
    if not alone:
        return None
    thing = alone[rng.integers(len(alone))]
    what = thing["shape"] if known == "shape" else f"{thing['color']} thing"
    return f"what {asked} is the {what}?", thing[asked]


def _count(objects: list[dict[str, Any]], rng: np.random.Generator) -> tuple[str, str]:
    """How many there are of a shape; the number is drawn first, among those that some shape has."""
    times = Counter(thing["shape"] for thing in objects)
    shapes: dict[int, list[str]] = defaultdict(list)
    for shape in SHAPES:
        shapes[times[shape]].append(shape)
    number = sorted(shapes)[rng.integers(len(shapes))]
    shape = shapes[number][rng.integers(len(shapes[number]))]
    return f"how many {plural(shape)} are there?", NUMBERS[number]


def _there(objects: list[dict[str, Any]], rng: np.random.Generator) -> tuple[str, str]:
    """Whether there is an object of a color and shape. A thing that is not there differs in one of the two from one
    that is, so that neither the color nor the shape alone tells."""
    thing = objects[rng.integers(len(objects))]
    color, shape = thing["color"], thing["shape"]
    present = {(other["color"], other["shape"]) for other in objects}
    there = rng.random() < 0.5
    while not there and (color, shape) in present:
        color, shape = thing["color"], thing["shape"]
        if rng.random() < 0.5:
            color = list(COLORS)[rng.integers(len(COLORS))]
        else:
            shape = list(SHAPES)[rng.integers(len(SHAPES))]
    return f"is there {'an' if color[0] in 'aeiou' else 'a'} {color} {shape}?", "yes" if there else "no"


def blind(lines: Sequence[dict[str, Any]]) -> float:
    """Share of questions that the most frequent answer of each kind gets right: a guess that looks at no picture."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        answers[line["kind"]].update(line["answers"])
    return sum(counts.most_common(1)[0][1] for counts in answers.values()) / max(1, len(lines))
