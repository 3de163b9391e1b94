"""The captions of spoken scenes: a small grammar over the objects of a picture and its ground.

    objects --units--> noun phrases --links--> core --opening, ground and attributes while there is room--> caption

A unit is one object or a group of equal ones ("two red circles"). A caption has 8 to 16 words, four objects a few more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feature_extract.sources.scene_drawing import COLORS, SHAPES, SIDE, TEXTURES, Thing
from feature_extract.sources.scene_grounds import GROUNDS

SHORTEST, LONGEST = 8, 16
LEAVE_OUT_SHARE = 0.2
"""In how many captions of two and more units one unit stays unsaid."""

COUNTS = ("", "a", "two", "three")
OPENINGS = ("there is", "i see", "we see", "here is", "you can see", "this picture shows", "look at")
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("medium",), "large": ("large", "big", "huge")}
GROUND_PHRASES = {
    "grass": ("on the grass", "on a meadow"),
    "sand": ("on the sand", "on a beach"),
    "sky": ("in the sky", "in front of the sky"),
    "night": ("at night", "in the dark night"),
    "snow": ("in the snow", "on the snow"),
    "brick": ("on a brick wall", "in front of a brick wall"),
    "water": ("in the water", "on the sea"),
    "wood": ("on a wooden table", "on the wood"),
}
LINKS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "before": ("in front of", "partly over"),
    "behind": ("behind", "partly behind"),
    "near": ("and", "with", "next to", "beside", "near"),
}
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left side", "in the middle", "on the right side"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


@dataclass(frozen=True)
class Caption:
    """text: lower-case words; mentioned: for every object of the picture, whether the caption names it."""

    text: str
    mentioned: tuple[bool, ...]

    @property
    def sentence(self) -> str:
        """As a person would write it: with a capital and a full stop."""
        return f"{self.text[0].upper()}{self.text[1:]}."


def words() -> tuple[str, ...]:
    """Every word the grammar can say, sorted."""
    plurals = [plural(shape) for shape in SHAPES]
    phrases = [*COUNTS, "an", "are", *OPENINGS, *COLORS, *SHAPES, *plurals, *TEXTURES, "and"]
    for table in (SIZE_WORDS, GROUND_PHRASES, LINKS):
        phrases += [phrase for group in table.values() for phrase in group]
    phrases += [place for row in PLACES for place in row]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def compose(things: tuple[Thing, ...], ground: str, rng: np.random.Generator) -> Caption:
    """One caption of the picture; another state of `rng` gives another telling."""
    assert ground in GROUNDS
    units = [[thing for thing in things if thing.unit == unit] for unit in sorted({thing.unit for thing in things})]
    units = [units[place] for place in rng.permutation(len(units))]
    if len(units) > 1 and rng.random() < LEAVE_OUT_SHARE:
        units.pop()
    said = {unit[0].unit for unit in units}
    return Caption(_sentence(units, things, ground, rng), tuple(thing.unit in said for thing in things))


def _sentence(units: list[list[Thing]], things: tuple[Thing, ...], ground: str, rng: np.random.Generator) -> str:
    links = [_link(units, things, number, rng) for number in range(1, len(units))]
    opening = _opening(units[0], rng)
    place = _place(units[0], rng) if len(units) == 1 else ""
    where = str(rng.choice(GROUND_PHRASES[ground]))
    attributes: list[dict[str, str]] = [{} for _ in units]
    extras: list[tuple[str, int]] = [("opening", 0), ("where", 0), ("place", 0)]
    for number, unit in enumerate(units):
        extras += [("size", number)] * (unit[0].size != "medium" or rng.random() < 0.25)
        extras += [("texture", number)] * (unit[0].texture != "plain" or rng.random() < 0.1)
    sides = {"opening": "", "where": "", "place": ""}
    skip = 0.1 if len(units) == 1 else 0.25
    for extra, number in (extras[at] for at in rng.permutation(len(extras))):
        sides_before, attributes_before = dict(sides), [dict(entry) for entry in attributes]
        if extra in sides:
            sides[extra] = {"opening": opening, "where": where, "place": place}[extra]
        else:
            attributes[number][extra] = _attribute(extra, units[number][0], rng)
        text = _join(units, links, attributes, sides)
        if len(text.split()) > LONGEST or rng.random() < skip:
            sides, attributes = sides_before, attributes_before
    if len(_join(units, links, attributes, sides).split()) < SHORTEST:
        sides = {"opening": opening, "where": where, "place": place}
    return _join(units, links, attributes, sides)


def _join(units: list[list[Thing]], links: list[str], attributes: list[dict[str, str]], sides: dict[str, str]) -> str:
    phrases = [_noun_phrase(unit, entry) for unit, entry in zip(units, attributes, strict=True)]
    core = phrases[0] + "".join(f" {link} {phrase}" for link, phrase in zip(links, phrases[1:], strict=True))
    return " ".join(part for part in (sides["opening"], core, sides["place"], sides["where"]) if part)


def _noun_phrase(unit: list[Thing], attributes: dict[str, str]) -> str:
    thing, count = unit[0], len(unit)
    said = [attributes[kind] for kind in ("size", "texture") if kind in attributes]
    rest = [*said, thing.color, thing.shape if count == 1 else plural(thing.shape)]
    article = COUNTS[count] if count > 1 else ("an" if rest[0][0] in "aeiou" else "a")
    return " ".join([article, *rest])


def plural(shape: str) -> str:
    """The name of several of a shape."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _attribute(kind: str, thing: Thing, rng: np.random.Generator) -> str:
    return str(rng.choice(SIZE_WORDS[thing.size])) if kind == "size" else thing.texture


def _opening(unit: list[Thing], rng: np.random.Generator) -> str:
    opening = str(rng.choice(OPENINGS))
    return opening.replace(" is", " are") if len(unit) > 1 and opening != "this picture shows" else opening


def _place(unit: list[Thing], rng: np.random.Generator) -> str:
    x, y = np.mean([(thing.x, thing.y) for thing in unit], axis=0)
    return PLACES[min(2, int(3 * y / SIDE))][min(2, int(3 * x / SIDE))]


def _link(units: list[list[Thing]], things: tuple[Thing, ...], number: int, rng: np.random.Generator) -> str:
    """The words between unit `number` - 1 and unit `number`: a true relation, or one that claims nothing."""
    kinds = _relations(units[number - 1], units[number], things)
    joins_pairs = number >= 2 and (len(units) == 4 and number == 2 or rng.random() < 0.3)
    if joins_pairs or not kinds:
        return "and" if joins_pairs else str(rng.choice(LINKS["near"]))
    phrases = LINKS[str(rng.choice(kinds))]
    return phrases[0] if len(units) > 2 else str(rng.choice(phrases))


def _relations(first: list[Thing], second: list[Thing], things: tuple[Thing, ...]) -> list[str]:
    """What holds for every object of `first` with every object of `second`; the main direction only."""
    one, two = (np.array([(thing.x, thing.y) for thing in unit]) for unit in (first, second))
    gaps = (two[None] - one[:, None]).reshape(-1, 2)
    if len(gaps) == 1 and np.hypot(*gaps[0]) < 0.35 * (first[0].diameter + second[0].diameter):
        return ["before" if things.index(first[0]) > things.index(second[0]) else "behind"]
    across, down = gaps[:, 0], gaps[:, 1]
    flat, steep = abs(across).mean() > 0.8 * abs(down).mean(), abs(down).mean() > 0.8 * abs(across).mean()
    tests = {
        "left": flat and across.min() > 12,
        "right": flat and across.max() < -12,
        "above": steep and down.min() > 12,
        "below": steep and down.max() < -12,
    }
    return [kind for kind, holds in tests.items() if holds]
