"""Where sequences begin: made once per batch in a loader worker, used by every attention layer.

The tokens of all sequences lie end to end. Attention pairs each query sequence with one key sequence, and reads it in
one of two ways: a GPU's kernel takes the borders of the sequences as they lie; elsewhere pairs of like length form a
bucket that a dense kernel computes at once, so that little is padded. Nothing but attention sees padding.
Shape legend: N query tokens, S pairs of sequences, K key tokens of all pairs, b pairs in one bucket, L padded length,
P and Q dense queries and keys of all buckets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 0.8
"""A pair joins a bucket when it is at least this share of the bucket's longest; below, the next bucket begins."""


@dataclass(frozen=True)
class Bucket:
    """`rows` pairs of like length: so many queries and keys of each, padding included.

    members (rows,) int64 on the host: the number of each among all pairs.
    valid (rows, keys) bool, True = may attend; None when no key is padding.
    """

    rows: int
    queries: int
    keys: int
    members: np.ndarray
    valid: Tensor | None


@dataclass(frozen=True)
class AttentionLayout:
    """Borders of the sequences for one kernel, buckets for the other; `pairs` and `padded` for whoever counts work.

    query_borders, key_borders (S + 1,) int32: where each sequence begins among the N queries and the K keys; the end.
    longest (longest query, longest key, 0): tokens of the longest sequences, or bounds on them, as shape of an empty
    tensor: torch.compile takes shapes as they come where it would build numbers in.
    key_order (K,) int64: brings keys into the order of pairs, as several pairs may share theirs; None: they lie so.
    query (P,), key (Q,) int64: into the flat tokens, bucket by bucket; padding repeats a valid token of its own
    sequence. key None: every sequence attends to itself, by `query`.
    inverse (N,) int64: where each query token lies among the P dense ones.
    pairs: queries x keys, summed over sequences: what attention cannot do without.
    padded: queries computed, padding included.
    order (N,) int64: the token of the sequences that lies at each place, where tokens lie in another order
    (`sorted_by`); place (N,) its inverse. None: they lie as the sequences do.
    """

    query_borders: Tensor
    key_borders: Tensor
    longest: Tensor
    key_order: Tensor | None
    query: Tensor
    key: Tensor | None
    inverse: Tensor
    buckets: tuple[Bucket, ...]
    pairs: int
    padded: int
    order: Tensor | None = None
    place: Tensor | None = None

    def sorted_by(self, order: Tensor, place: Tensor) -> AttentionLayout:
        """The same self-attention of tokens that lie in another order: token order[j] of the sequences at place j."""
        assert self.key is None and self.order is None
        return dataclasses.replace(self, query=place[self.query], inverse=self.inverse[order], order=order, place=place)


def self_layout(lengths: np.ndarray) -> AttentionLayout:
    """Every sequence attends to itself. lengths (S,) > 0."""
    starts = np.cumsum(lengths) - lengths
    return _layout(starts, lengths, starts, lengths, alone=True)


def cross_layout(
    query_starts: np.ndarray, query_lengths: np.ndarray, key_starts: np.ndarray, key_lengths: np.ndarray
) -> AttentionLayout:
    """Query sequence s attends to key sequence s. All (S,); lengths > 0; the queries are all tokens, end to end."""
    if not np.array_equal(query_starts, np.cumsum(query_lengths) - query_lengths):
        raise ValueError("the queries must be all tokens, sequence after sequence")
    return _layout(query_starts, query_lengths, key_starts, key_lengths, alone=False)


def _layout(
    query_starts: np.ndarray, query_lengths: np.ndarray, key_starts: np.ndarray, key_lengths: np.ndarray, alone: bool
) -> AttentionLayout:
    if len(query_lengths) and (query_lengths.min() < 1 or key_lengths.min() < 1):
        raise ValueError("every sequence needs at least one token; leave absent sequences out")
    buckets: list[Bucket] = []
    queries, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    inverse = np.zeros(int(query_lengths.sum()), np.int64)
    padded = 0
    for rows in _alike(query_lengths, key_lengths):
        query, query_valid = _dense(query_starts[rows], query_lengths[rows])
        key, key_valid = (query, query_valid) if alone else _dense(key_starts[rows], key_lengths[rows])
        inverse[query[query_valid]] = padded + np.flatnonzero(query_valid.ravel())
        valid = None if key_valid.all() else torch.from_numpy(key_valid)
        buckets.append(Bucket(len(rows), query.shape[1], key.shape[1], rows, valid))
        queries.append(query.ravel())
        keys.append(key.ravel())
        padded += query.size
    query_borders, key_borders = _borders(query_lengths), _borders(key_lengths)
    in_order = alone or np.array_equal(key_starts, key_borders[:-1])
    return AttentionLayout(
        query_borders=torch.from_numpy(query_borders), key_borders=torch.from_numpy(key_borders),
        longest=torch.empty(query_lengths.max(initial=0), key_lengths.max(initial=0), 0, dtype=torch.uint8),
        key_order=None if in_order else torch.from_numpy(ranges(key_starts, key_lengths)),
        query=torch.from_numpy(np.concatenate(queries)), key=None if alone else torch.from_numpy(np.concatenate(keys)),
        inverse=torch.from_numpy(inverse), buckets=tuple(buckets),
        pairs=int((query_lengths * key_lengths).sum()), padded=padded,
    )


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`lengths[s]` numbers from `starts[s]` on, for every s, end to end: int64 (K,)."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))


def _borders(lengths: np.ndarray) -> np.ndarray:
    """Where each sequence begins, and the end: int32 (S + 1,)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).astype(np.int32)


def _alike(query_lengths: np.ndarray, key_lengths: np.ndarray) -> list[np.ndarray]:
    """Pairs in buckets whose queries and keys are no shorter than TOLERANCE of the bucket's longest key."""
    order = np.lexsort((query_lengths, key_lengths))[::-1]
    groups: list[np.ndarray] = []
    while len(order):
        shortest = TOLERANCE * key_lengths[order[0]]
        size = int(np.searchsorted(-key_lengths[order], -shortest, side="right"))
        groups.append(np.sort(order[:size]))
        order = order[size:]
    return groups


def _dense(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index (b, L) into flat tokens, padding repeating each row's last token, and which entries are real (b, L)."""
    steps = np.arange(int(lengths.max()))
    valid = steps[None, :] < lengths[:, None]
    return starts[:, None] + np.minimum(steps[None, :], lengths[:, None] - 1), valid
