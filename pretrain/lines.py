"""The lines that a run adds to a file as it goes, each a JSON object with its `step`: metrics.jsonl, skipped.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from opt.files import write_atomic


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines beyond a step that a run goes on from, which are written again, and those that a kill cut short or
    that are none of ours. Returns what is left."""
    texts = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept = [(text, line) for text in texts if (line := _line(text)) is not None and line["step"] <= step]
    if len(kept) < len(texts):
        write_atomic(path, "".join(f"{text}\n" for text, _ in kept).encode())
    return [line for _, line in kept]


def _line(text: str) -> dict[str, Any] | None:
    """A line with a finite step, and seconds that are finite where it has any."""
    try:
        line = json.loads(text)
        return line if math.isfinite(line["step"]) and math.isfinite(line.get("seconds", 0.0)) else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
