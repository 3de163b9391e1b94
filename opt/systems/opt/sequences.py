"""What is read off the packed sequences of a batch: their parts by themselves, padded states, sums over regions.

Shape legend: N packed tokens, S sequences of the encoder's view, B of them, L length, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from opt.data.batch import Batch
from opt.data.layout import ranges
from opt.nn.states import ABSENT, States


def part(batch: Batch, entries: Tensor, rows: np.ndarray, skipped: int) -> States:
    """The entries of the sequences `rows` (B,) of the encoder's view, each without its first `skipped`; of ABSENT ones
    none."""
    view, absent = batch.views["encoder"], rows == ABSENT
    starts = np.cumsum(view.lengths) - view.lengths
    lengths = np.where(absent, 0, view.lengths[rows] - skipped)
    index = torch.from_numpy(ranges(starts[rows] + skipped, lengths)).to(entries.device)
    return States(nn.functional.embedding(view.gather[index], entries), lengths)


def padded(batch: Batch, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Packed states of the encoder's view as (S, L, D), and which of them are real (S, L)."""
    first = batch.views["encoder"].first
    lengths_S = torch.diff(first, append=first.new_tensor([len(hidden_ND)]))
    padded_SLD = nn.utils.rnn.pad_sequence(list(hidden_ND.split(lengths_S.tolist())), batch_first=True)
    places_L = torch.arange(padded_SLD.shape[1], device=hidden_ND.device)
    return padded_SLD, places_L[None, :] < lengths_S[:, None]


def highest_region(batch: Batch, hidden_ND: Tensor) -> Tensor:
    """The maximum of each feature over a sequence's regions, 0 where it has none: (S, D)."""
    view, words, regions = batch.views["encoder"], len(batch.text.ids), len(batch.regions.masked)
    region_N = (view.gather >= words) & (view.gather < words + regions)
    hidden_SLD, valid_SL = padded(batch, hidden_ND.masked_fill(~region_N[:, None], float("-inf")))
    highest_SD = hidden_SLD.masked_fill(~valid_SL[:, :, None], float("-inf")).amax(dim=1)
    return highest_SD.masked_fill(highest_SD == float("-inf"), 0.0)
