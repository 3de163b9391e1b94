"""Sizes and rules that the configurations of several systems share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opt.config import UserError
from opt.data.pixels import Sight


@dataclass(frozen=True)
class Sizes:
    """Sizes of a transformer."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    inner: int = 3072
    """Width of the feed-forward."""

    @property
    def wrong(self) -> list[str]:
        """What is out of range, in words."""
        low = [f"{name} {getattr(self, name)} must be at least 1" for name in ("width", "layers", "heads", "inner")
               if getattr(self, name) < 1]
        return low or [f"width {self.width} must be a multiple of heads {self.heads}"] * (self.width % self.heads != 0)


TINY = Sizes(width=192, layers=4, heads=4, inner=768)
TINY_SIGHT = Sight(size=64, patch=8)


def require(config: Any, rules: Sequence[tuple[Sequence[str], str, Any]]) -> None:
    """Raises UserError that lists everything out of range: in `Sizes` and `Sight` fields of the configuration, and by
    `rules`: names of numbers, the rule in words, and the rule."""
    wrong = [f"{name}.{said}" for name, value in vars(config).items() if isinstance(value, Sizes | Sight)
             for said in value.wrong]
    for names, said, holds in rules:
        values = {name: getattr(config, name) for name in names}
        wrong += [f"{name.replace('_', '-')} {value} must be {said}" for name, value in values.items()
                  if not (math.isfinite(value) and holds(value))]
    if wrong:
        raise UserError(f"--model: {'; '.join(wrong)}")
