"""Where sequences begin: made once per batch in a loader worker, used by every attention layer.

The tokens of all sequences lie end to end. Attention pairs each query sequence with one key sequence; pairs of like
length form a bucket that a dense kernel computes at once: little is padded, and nothing but attention sees padding.
Shape legend: N query tokens, S pairs of sequences, b pairs in one bucket, L padded length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 0.7
"""A pair joins a bucket when it is at least this share of the bucket's longest; below, the next bucket begins."""


@dataclass(frozen=True)
class Bucket:
    """Pairs of like length: `rows` of them, a slice of the layout's dense queries and one of its dense keys.

    valid (rows, Lk) bool, True = may attend; None when no key is padding.
    """

    rows: int
    queries: slice
    keys: slice
    valid: Tensor | None


@dataclass(frozen=True)
class AttentionLayout:
    """All buckets, end to end.

    query (P,), key (Q,): int64 into the flat tokens; padding repeats a valid token of its own sequence.
    inverse (N,) int64: where each query token lies among the P dense ones.
    """

    query: Tensor
    key: Tensor
    inverse: Tensor
    buckets: tuple[Bucket, ...]


def self_layout(lengths: np.ndarray) -> AttentionLayout:
    """Every sequence attends to itself. lengths (S,) > 0."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    return cross_layout(starts, lengths, starts, lengths)


def cross_layout(
    query_starts: np.ndarray, query_lengths: np.ndarray, key_starts: np.ndarray, key_lengths: np.ndarray
) -> AttentionLayout:
    """Query sequence s attends to key sequence s. All (S,); lengths > 0; the queries are all tokens, end to end."""
    if len(query_lengths) and (query_lengths.min() < 1 or key_lengths.min() < 1):
        raise ValueError("every sequence needs at least one token; leave absent sequences out")
    buckets: list[Bucket] = []
    queries, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    inverse = np.zeros(int(query_lengths.sum()), np.int64)
    query_end = key_end = 0
    for rows in _alike(query_lengths, key_lengths):
        query, query_valid = _dense(query_starts[rows], query_lengths[rows])
        key, key_valid = _dense(key_starts[rows], key_lengths[rows])
        inverse[query[query_valid]] = query_end + np.flatnonzero(query_valid.ravel())
        query_slice, key_slice = slice(query_end, query_end + query.size), slice(key_end, key_end + key.size)
        valid = None if key_valid.all() else torch.from_numpy(key_valid)
        buckets.append(Bucket(len(rows), query_slice, key_slice, valid))
        queries.append(query.ravel())
        keys.append(key.ravel())
        query_end, key_end = query_slice.stop, key_slice.stop
    flat_query, flat_key = torch.from_numpy(np.concatenate(queries)), torch.from_numpy(np.concatenate(keys))
    return AttentionLayout(flat_query, flat_key, torch.from_numpy(inverse), tuple(buckets))


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
