"""Image codes as what hidden patches are: the stored code at a patch's place says what a visual tokenizer saw there
(BEiT, arXiv 2106.08254, section 2.1), so patches and codes must lie on one grid over the same part of the picture.

Shape legend: P patches, row by row.
"""

from __future__ import annotations

import numpy as np

from opt.config import UserError
from opt.data.pixels import Sight
from opt.data.record import Sample
from opt.systems.system import DataFacts


def require_codes(sight: Sight, facts: DataFacts) -> None:
    """Raises UserError where patches seen so have no stored codes: there are none, or they lie elsewhere."""
    if not facts.codebook:
        raise UserError("hidden patches are predicted as image codes, and the shards hold none: extract again with "
                        "--codes tiny")
    if sight.fit != "squeeze" or sight.least_area < 1:
        raise UserError(f"image codes are those of the whole picture squeezed into a square: give --model.sight.fit "
                        f"squeeze and --model.sight.least-area 1, not {sight.fit} and {sight.least_area}")
    if facts.codes_grid not in (0, sight.grid):
        raise _elsewhere(sight, facts.codes_grid)


def codes_of(sample: Sample, sight: Sight) -> np.ndarray | None:
    """Codes of the patches of a sample's first picture, int64 (P,); None where none are stored. Raises UserError for
    those of another grid."""
    codes = sample.pictures[0].codes if sample.pictures else None
    if codes is not None and codes.size != sight.grid**2:
        raise _elsewhere(sight, len(codes))
    return None if codes is None else codes.ravel().astype(np.int64)


def _elsewhere(sight: Sight, grid: int) -> UserError:
    return UserError(f"the shards tell a picture in {grid} x {grid} codes, the model sees it in {sight.grid} x "
                     f"{sight.grid} patches: extract again with --codes-grid {sight.grid}, or give another size or "
                     "patch of --model.sight")
