"""Searches of a split in one direction: by vectors, by vectors and then matching, by matching alone.

    Searches(task, numbers, folds, ...)  --aligned | two_stage | all_pairs-->  Search: ranks and the first k

Vectors and states of single modalities are computed once, whichever directions ask for them.
Shape legend: N samples, Q queries, C candidates, k first candidates, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from eval.lookup.nearest import first_k
from eval.matching import Matching
from eval.ranking import rank
from eval.task import Task

Modalities = tuple[str, ...]
SHOWN = 5
"""Candidates that are kept for the report at least."""


class Search(NamedTuple):
    """One direction: sample numbers of queries (Q,) and candidates (C,), ranks (Q,), the first k as sample numbers."""

    queries: np.ndarray
    candidates: np.ndarray
    ranks: np.ndarray
    first: np.ndarray


@dataclass
class Searches:
    """A split as it is searched: which samples take part, in which fold, how deep."""

    task: Task
    numbers: np.ndarray
    """Samples that take part (N,)."""
    folds: np.ndarray
    """Of every sample of the split: queries find candidates of their own fold only."""
    rerank: int
    """How many of the first two_stage orders again."""
    faiss: str | None
    """How FAISS finds the first; None: they are found exactly."""
    matching: Matching
    vectors: dict[Modalities, np.ndarray] = field(default_factory=dict)
    refused: dict[tuple[str, Modalities], str] = field(default_factory=dict)
    """What the system said to an ability and modalities, tried once; nothing where it can."""

    def members(self, modalities: Modalities) -> np.ndarray:
        """Sample numbers that stand for `modalities`: every caption and recording, but each picture once."""
        split = self.task.split
        numbers = np.intersect1d(split.with_all(modalities), self.numbers)
        return split.one_a_picture(numbers) if modalities == ("image",) else numbers

    def embed(self, modalities: Modalities) -> np.ndarray:
        """Unit vectors of `members`, (n, E) float32; computed once."""
        if modalities not in self.vectors:
            embed = self.task.system.embed
            self.vectors[modalities] = self.task.tensor(
                self.members(modalities), lambda samples: embed(samples, modalities), f"embed {' + '.join(modalities)}"
            )
        return self.vectors[modalities]

    def pairs(self, given: Modalities, sought: Modalities) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each fold, the places among `members(given)` of queries with an answer, and of all candidates. Raises
        LookupError with the reason when there are none."""
        groups, folds = self.task.split.groups, self.folds
        queries, candidates = self.members(given), self.members(sought)
        answerable = np.isin(groups[queries], groups[candidates])
        if not answerable.any():
            raise LookupError(self.task.split.reading.absent((*given, *sought)))
        return [
            (np.flatnonzero(answerable & (folds[queries] == fold)), np.flatnonzero(folds[candidates] == fold))
            for fold in np.unique(folds[queries[answerable]])
        ]

    def refusal(self, ability: Literal["embed", "score"], modalities: Modalities) -> str:
        """Why the system cannot embed `modalities`, or score how well they match; nothing where it can."""
        asked = ability, tuple(sorted(modalities))
        if asked not in self.refused:
            numbers = self.task.split.with_all(modalities)
            able = getattr(self.task.system, ability)
            self.refused[asked] = (
                self.task.refusal(lambda samples: able(samples, modalities), int(numbers[0])) if len(numbers) else "")
        return self.refused[asked]

    def aligned(self, given: Modalities, sought: Modalities) -> Search:
        """Candidates by products of vectors."""
        groups, found = self.task.split.groups, []
        queries, candidates = self.members(given), self.members(sought)
        pairs = self.pairs(given, sought)
        k = min(max(self.rerank, SHOWN), min(len(places) for _, places in pairs))
        query_QE, candidate_CE = self.embed(given), self.embed(sought)
        for asked, offered in pairs:
            ranking = rank(
                query_QE[asked], candidate_CE[offered], groups[queries[asked]], groups[candidates[offered]], k,
                self.task.provenance.seed,
            )  # fmt: skip
            first = first_k(query_QE[asked], candidate_CE[offered], k, self.faiss) if self.faiss else ranking.first
            found.append(Search(queries[asked], candidates[offered], ranking.ranks, candidates[offered][first]))
        return _joined(found)

    def two_stage(self, given: Modalities, sought: Modalities, search: Search) -> Search:
        """The first `rerank` by alignment, ordered again by pairs; what is not among them stands below."""
        first = search.first[:, : self.rerank]
        below_Q = np.maximum(search.ranks, first.shape[1] + 1)  # FAISS, or a tie at the cut, may have left it out
        return search._replace(ranks=self._by_pairs(given, sought, search.queries, first, below_Q))

    def all_pairs(self, given: Modalities, sought: Modalities) -> Search:
        """Every candidate by its pair. Raises UserError where these are too many."""
        queries, candidates, found = self.members(given), self.members(sought), []
        for asked, offered in self.pairs(given, sought):
            self.matching.require_few(given, sought, asked, offered)
            every = np.tile(candidates[offered], (len(asked), 1))
            ranks = self._by_pairs(given, sought, queries[asked], every, np.full(len(asked), np.inf))
            found.append(Search(queries[asked], candidates[offered], ranks, np.empty((len(asked), 0), np.int64)))
        return _joined(found)

    def _by_pairs(
        self, given: Modalities, sought: Modalities, queries: np.ndarray, found_Qk: np.ndarray, otherwise_Q: np.ndarray
    ) -> np.ndarray:
        """Ranks (Q,) among `found_Qk` by the log-odds of matching, and the cosine as far as the system weighs it."""
        beside_Qk: np.ndarray | float = 0.0
        if weight := self.task.system.cosine_weight:
            query_QE = self.embed(given)[np.searchsorted(self.members(given), queries)]
            places_Qk = np.searchsorted(self.members(sought), found_Qk)
            candidate_CE = self.embed(sought)
            beside_Qk = weight * np.stack([
                candidate_CE[places_k] @ query_E for places_k, query_E in zip(places_Qk, query_QE, strict=True)
            ])  # fmt: skip
        return self.matching.among_first(given, sought, queries, found_Qk, beside_Qk, otherwise_Q)


def _joined(searches: Sequence[Search]) -> Search:
    """Several folds as one."""
    columns = zip(*searches, strict=True)
    return Search(*(np.concatenate(column) for column in columns))
