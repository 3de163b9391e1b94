"""Pairs scored by a system's fusion: what single modalities are is kept, each pair costs one fusion pass, once.

    numbers --System.alone, once--> States       pairs (query, candidate) --System.fuse--> log-odds that they match

Shape legend: Q queries, C candidates, k first candidates, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from eval.ranking import ranks
from eval.task import Task, require_finite
from opt.config import UserError
from opt.nn.states import States
from opt.progress import progress
from opt.systems.system import MODALITIES

TIE = 1e-4
"""Log-odds closer than this are equal: the same pair in another batch differs in its last bits."""
PAIRS_A_CALL = 2
"""Pairs in one call of the model, times `--batch`: they are short."""
MOST_PAIRS = 25_000_000
"""Most pairs of all queries with all candidates that are begun at all."""


class Matching:
    """Scores of pairs. A pair that two directions ask for is computed once.

    single_passes and fusion_passes count what the system was asked for.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.single_passes = self.fusion_passes = 0
        self._states: dict[str, tuple[np.ndarray, States]] = {}
        self._known: dict[tuple[frozenset[str], ...], tuple[np.ndarray, np.ndarray]] = {}

    def among_first(
        self, given: Sequence[str], sought: Sequence[str], queries: np.ndarray, found_Qk: np.ndarray,
        beside_Qk: np.ndarray | float, otherwise_Q: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """Ranks (Q,) when the first k candidates are ordered by matching, `beside_Qk` added to its log-odds; where no
        positive is among them, the rank is `otherwise_Q`. `queries` (Q,) and `found_Qk` (Q, k) are sample numbers."""
        groups = self.task.split.groups
        pairs_P2 = np.stack([np.repeat(queries, found_Qk.shape[1]), found_Qk.ravel()], axis=1)
        scores_Qk = self.scores(given, sought, pairs_P2).reshape(found_Qk.shape)
        rank_Q = ranks(scores_Qk + beside_Qk, groups[found_Qk] == groups[queries, None], TIE)
        return np.where(np.isfinite(rank_Q), rank_Q, otherwise_Q)

    @staticmethod
    def require_few(
        given: Sequence[str], sought: Sequence[str], queries: np.ndarray, candidates: np.ndarray
    ) -> None:
        """Raises UserError where scoring every pair would be more than MOST_PAIRS."""
        if (count := len(queries) * len(candidates)) > MOST_PAIRS:
            raise UserError(
                f"--by all-pairs would fuse {count:,} pairs of {' + '.join(given)} and {' + '.join(sought)}, and "
                f"{MOST_PAIRS:,} is the most: give --by two-stage, or fewer samples by --limit"
            )

    def scores(self, given: Sequence[str], sought: Sequence[str], pairs_P2: np.ndarray) -> np.ndarray:
        """Log-odds (P,) float32 that each query (first column, its `given`) and candidate (`sought`) match."""
        sides = (frozenset(given), frozenset(sought))
        if min(given) > min(sought):  # one direction and its reverse share their pairs
            sides, pairs_P2 = sides[::-1], pairs_P2[:, ::-1]
        codes = pairs_P2[:, 0].astype(np.int64) * len(self.task.split) + pairs_P2[:, 1]
        known, values = self._known.get(sides, (np.zeros(0, np.int64), np.zeros(0, np.float32)))
        fresh = np.setdiff1d(codes, known)
        if len(fresh):
            known = np.concatenate([known, fresh])
            values = np.concatenate([values, self._fuse(sides, *np.divmod(fresh, len(self.task.split)))])
            order = np.argsort(known)
            self._known[sides] = known, values = known[order], values[order]
        return values[np.searchsorted(known, codes)]

    @torch.inference_mode()
    def _fuse(self, sides: tuple[frozenset[str], ...], first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The scores of fresh pairs, in batches."""
        chosen = {name: column for side, column in zip(sides, (first, second), strict=True) for name in side}
        kept = {name: self._alone(name, column) for name, column in chosen.items()}
        label = f"match {' + '.join(name for name in MODALITIES if name in chosen)}"
        scores, size = np.empty(len(first), np.float32), PAIRS_A_CALL * self.task.batch  # pieces would hold memory open
        with progress(label, total=len(first), unit="pairs") as bar:
            for start in range(0, len(first), size):
                rows = {
                    name: np.searchsorted(kept[name][0], column[start : start + size])
                    for name, column in chosen.items()
                }
                parts = {name: states for name, (_, states) in kept.items()}
                found = self.task.system.fuse(parts, rows).float().cpu().numpy()
                require_finite(found, [self.task.split.keys[number] for number in first[start : start + size]], label)
                scores[start : start + size] = found
                bar.advance(len(found))
        self.fusion_passes += len(first)
        return scores

    def _alone(self, modality: str, numbers: np.ndarray) -> tuple[np.ndarray, States]:
        """Sample numbers in ascending order with their states, at least `numbers`; each is computed once."""
        numbers = np.unique(numbers)
        known, states = self._states.get(modality, (np.zeros(0, np.int64), None))
        fresh = np.setdiff1d(numbers, known)
        if len(fresh):
            pieces = [] if states is None else [states]
            system = self.task.system
            pieces += self.task.batches(fresh, lambda samples: [system.alone(samples, modality)], f"read {modality}")
            known = np.concatenate([known, fresh])
            order = np.argsort(known)
            self._states[modality] = known[order], States.joined(pieces).take(order)
            self.single_passes += len(fresh)
        return self._states[modality]
