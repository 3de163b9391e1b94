"""Figures that the paper reports, for metrics of ours that have the same name: on other data, so never compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MARK = "reported, other data"


@dataclass(frozen=True)
class Reported:
    """One table's figures of one model."""

    name: str
    """The model and the table."""
    data: str
    protocol: str
    """What is known of how they were measured."""
    figures: Mapping[str, float]
    """Shares by our metrics' names."""

    @property
    def about(self) -> str:
        return f"{source()}, {self.name}: {self.data}; {self.protocol}"


@cache
def _content() -> dict:
    return json.loads(Path(__file__).with_name("reported.json").read_text(encoding="utf-8"))


def source() -> str:
    return _content()["source"]


def reported(names: list[str]) -> list[Reported]:
    """The tables that hold a figure of one of the metrics `names`, in the order of the file."""
    tables = [Reported(**column) for column in _content()["columns"]]
    return [table for table in tables if not table.figures.keys().isdisjoint(names)]
