"""Which numbers a run may be given: checked before anything is read, every complaint in one sentence."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from opt.config import UserError

AT_LEAST_ONE = {"steps", "batch_tokens", "accumulate", "multiple", "log_every", "save_every", "keep", "max_skipped",
                "validate_batches"}
POSITIVE = {"learning_rate", "clip", "cache_gigabytes"}
NOT_NEGATIVE = {"workers", "weight_decay", "final", "validate_every", "patience", "profile"}
SEED = {"seed"}
SHARE = {"warmup", "beta1", "beta2"}


def check(settings: Any, group: str = "") -> None:
    """Raises UserError that names every field of a dataclass whose number breaks its rule, as the option it is."""
    complaints = []
    for field in fields(settings):
        value, name = getattr(settings, field.name), field.name
        rules = (
            (AT_LEAST_ONE, "from 1 to 10^12", lambda number: 1 <= number <= 10**12),
            (POSITIVE, "above 0", lambda number: number > 0),
            (NOT_NEGATIVE, "at least 0", lambda number: number >= 0),
            (SEED, "at least 0 and below 2^63", lambda number: 0 <= number < 2**63),
            (SHARE, "at least 0 and below 1", lambda number: 0 <= number < 1),
        )
        for named, rule, holds in rules:
            if name in named and not (math.isfinite(value) and holds(value)):
                complaints.append(f"--{f'{group}.' * bool(group)}{name.replace('_', '-')} {value} must be {rule}")
    if complaints:
        raise UserError("; ".join(complaints))
