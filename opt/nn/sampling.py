"""How text or image codes are written: the likeliest token each time, drawn by chance, or by beam search."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from opt.config import UserError

DRAWN_CODES = 32
"""Image codes are drawn among so many likeliest ones where nothing else is asked for."""


@dataclass(frozen=True)
class Sampling:
    """How text or image codes are written: the likeliest token each time, drawn by chance, or by beam search.

    Raises UserError for values out of range, or that contradict each other.
    """

    beams: int = 1
    """Sequences kept under way by beam search, which looks for the likeliest whole; 1: no beam search."""
    length_penalty: float = 1.0
    """Beam search divides a log-probability by ((5 + tokens) / 6) to this power: 0 favours short texts (Wu et al.)."""
    top_k: int | None = None
    """Draw among so many likeliest tokens; 1 takes the likeliest, 0 draws among all. Left out, text takes the likeliest
    unless --top-p or --temperature asks for a draw, and pictures are drawn among 32."""
    top_p: float = 1.0
    """Draw among the fewest tokens that together have this probability (nucleus sampling)."""
    temperature: float = 1.0
    """Drawing: below 1 likely tokens become likelier, above 1 less so."""
    seed: int = 0
    """Seed of what is drawn; each sample draws its own numbers, whoever shares its batch."""
    limit: int = 62
    """Longest text in tokens, at most what the model was made for; pictures always fill their grid."""

    def __post_init__(self) -> None:
        for name, rule, kept in (
            ("beams", "must be at least 1", self.beams >= 1),
            ("length_penalty", "must be from 0 to 10", 0 <= self.length_penalty <= 10),
            ("top_k", "must be at least 1, or 0 to draw among all", self.top_k is None or self.top_k >= 0),
            ("top_p", "must be above 0 and at most 1", 0 < self.top_p <= 1),
            ("temperature", "must be from 0.001 to 1000; top-k 1 draws nothing", 0.001 <= self.temperature <= 1000),
            ("seed", "must be at least 0", self.seed >= 0),
            ("limit", "must be at least 1", self.limit >= 1),
        ):
            if not kept:
                raise UserError(f"{name.replace('_', '-')} {getattr(self, name)} {rule}")
        drawing = self.top_p < 1 or self.temperature != 1
        if self.beams > 1 and (drawing or self.top_k not in (None, 1)):
            raise UserError(f"beams {self.beams} looks for the likeliest, top-k, top-p and temperature draw by chance: "
                            "give one or the other")
        if self.top_k == 1 and drawing:
            raise UserError("top-k 1 leaves nothing to draw among: leave top-p and temperature out, or give top-k 0")

    def for_text(self) -> Sampling:
        """With `top_k` as it holds for text."""
        return self._with_top_k(0 if self.top_p < 1 or self.temperature != 1 else 1)

    def for_codes(self) -> Sampling:
        """With `top_k` as it holds for image codes."""
        return self._with_top_k(1 if self.beams > 1 else DRAWN_CODES)

    def _with_top_k(self, usual: int) -> Sampling:
        return self if self.top_k is not None else dataclasses.replace(self, top_k=usual)

    @property
    def protocol(self) -> str:
        """In words, for the note beside a figure; of `for_text()` or `for_codes()`."""
        if self.beams > 1:
            return f"beam search, {self.beams} beams, length penalty {self.length_penalty:g}"
        if self.top_k == 1:
            return "greedy decoding"
        among = f"top-{self.top_k} sampling" if self.top_k else "sampling"
        nucleus = f" from the nucleus of {self.top_p:g}" if self.top_p < 1 else ""
        return f"{among}{nucleus} at temperature {self.temperature:g}, seed {self.seed}"
