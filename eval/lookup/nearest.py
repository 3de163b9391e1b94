"""The nearest of many vectors by inner product: exactly, or by FAISS, which looks at some of them only.

    exact       a matrix product, block by block: memory does not grow with the candidates, which may lie on disk
    FAISS       proposes rows by a structure built once ("HNSW32"); their similarities are computed, never its guesses

Similarities are compared after rounding, and equals stand in the order of the candidates: the same picture embedded in
another batch differs in the last bits. Shape legend: Q queries, C candidates, k rows found a query, E width of vectors.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from opt.config import UserError, extra
from opt.files import open_atomic, sha256

DECIMALS = 5
"""Similarities are rounded to so many digits before they are compared."""
CANDIDATES, QUERIES = 32_768, 256
"""Candidates and queries in one product: 32 MiB of similarities."""
TRAINING = 262_144
"""At most so many vectors, evenly spaced, train what a FAISS factory needs trained."""
SPARE = 16
"""FAISS proposes so many rows more than are asked for: it cuts between equals by their last bits."""
JUDGED = 200
"""So many vectors, drawn by a fixed seed, are looked for again to say how much of the truth FAISS finds."""


def first_k(query_QE: np.ndarray, candidate_CE: np.ndarray, k: int, factory: str | None = None) -> np.ndarray:
    """Rows (Q, min(k, C)) int64 of the nearest candidates of each query, best first, among equals the earlier row.

    factory: how FAISS looks for them, see `build`; None looks at every candidate.
    """
    if factory is None:
        return exact(query_QE, candidate_CE, k)[1]
    return approximate(build(candidate_CE, factory), query_QE, candidate_CE, k)[1]


def exact(query_QE: np.ndarray, candidate_CE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities (Q, min(k, C)) float32 and rows (Q, min(k, C)) int64 of the nearest, best first.

    Candidates may be memory-mapped: each block is read once. Raises ValueError for a query that is not finite.
    """
    if not np.isfinite(query_QE).all():
        raise ValueError("a query's vector must be finite")
    queries, k = len(query_QE), min(k, len(candidate_CE))
    best_Qk = np.full((queries, k), -np.inf, np.float32)
    row_Qk = np.full((queries, k), -1, np.int64)
    for start in range(0, len(candidate_CE), CANDIDATES):
        block_CE = np.asarray(candidate_CE[start : start + CANDIDATES])
        for first in range(0, queries, QUERIES):
            scores_QC = np.round(query_QE[first : first + QUERIES] @ block_CE.T, DECIMALS)
            for query, scores_C in enumerate(scores_QC, start=first):
                _keep_best(best_Qk[query], row_Qk[query], scores_C, start)
    return best_Qk, row_Qk


def _keep_best(best_k: np.ndarray, row_k: np.ndarray, scores_C: np.ndarray, start: int) -> None:
    """Merge a block, whose first row is `start`, into the best so far, in place. Earlier rows win among equals."""
    better = np.flatnonzero(scores_C > best_k[-1])
    if len(better) > len(best_k):
        cut = len(better) - len(best_k)
        better = better[scores_C[better] >= np.partition(scores_C[better], cut)[cut]]
    if len(better):
        scores, rows = np.concatenate([best_k, scores_C[better]]), np.concatenate([row_k, better + start])
        order = np.argsort(-scores, kind="stable")[: len(best_k)]
        best_k[:], row_k[:] = scores[order], rows[order]


def build(vector_CE: np.ndarray, factory: str) -> Any:
    """A FAISS index over the vectors by inner product, trained where it must be; it lies in memory.

    factory: see `empty`. Raises UserError without FAISS, and where FAISS refuses, such as too few vectors to train on.
    """
    index = empty(vector_CE.shape[1], factory)
    try:
        if not index.is_trained:
            some = np.linspace(0, len(vector_CE) - 1, min(TRAINING, len(vector_CE))).astype(np.int64)
            index.train(np.ascontiguousarray(vector_CE[some], np.float32))
        for start in range(0, len(vector_CE), CANDIDATES):
            index.add(np.ascontiguousarray(vector_CE[start : start + CANDIDATES], np.float32))
    except RuntimeError as error:
        raise _refused(factory, error) from error
    return index


def empty(width: int, factory: str) -> Any:
    """A FAISS index without a vector.

    factory: FAISS's own word for the structure, and after a space how it is searched: "HNSW32", "HNSW32 efSearch=64",
    "IVF256,Flat nprobe=16". Raises UserError without FAISS, and for words that it does not know.
    """
    faiss = load_faiss()
    structure, _, searched = factory.strip().partition(" ")
    try:
        index = faiss.index_factory(width, structure, faiss.METRIC_INNER_PRODUCT)
        if searched:
            faiss.ParameterSpace().set_index_parameters(index, searched.strip())
    except RuntimeError as error:
        raise _refused(factory, error) from error
    return index


def _refused(factory: str, error: RuntimeError) -> UserError:
    reason = str(error).strip().rpartition(": ")[2]  # what comes before is a place in FAISS's source
    return UserError(f"FAISS refuses {factory!r} ({reason}); HNSW32 takes any number of vectors")


def approximate(index: Any, query_QE: np.ndarray, candidate_CE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `exact`, among the rows that a FAISS index of the candidates proposes.

    A query for which it proposes fewer than there are to be is answered exactly.
    """
    k = min(k, len(candidate_CE))
    proposed = min(k + SPARE, len(candidate_CE))
    best_Qk, row_Qk = np.empty((len(query_QE), k), np.float32), np.empty((len(query_QE), k), np.int64)
    for first in range(0, len(query_QE), QUERIES):
        some_QE = np.ascontiguousarray(query_QE[first : first + QUERIES], np.float32)
        rows = index.search(some_QE, proposed)[1]
        short = (rows < 0).any(axis=1)
        if short.any():
            rows[short] = exact(some_QE[short], candidate_CE, proposed)[1]
        rows = np.sort(rows, axis=1)  # so that a stable sort leaves equals in the order of the candidates
        scores = np.round(np.einsum("qe,qke->qk", some_QE, candidate_CE[rows]), DECIMALS)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        here = slice(first, first + len(some_QE))
        best_Qk[here], row_Qk[here] = (np.take_along_axis(table, order, axis=1) for table in (scores, rows))
    return best_Qk, row_Qk


def share_found(index: Any, vector_CE: np.ndarray, depth: int = 10) -> tuple[float, int]:
    """The share of the true first `depth` that FAISS finds of vectors of its own, and how many were looked for.

    A row counts as found where it is as similar as the true one at its depth, whichever of several equals it is.
    """
    drawn = np.random.default_rng(0).permutation(len(vector_CE))[:JUDGED]
    query_QE = np.asarray(vector_CE[np.sort(drawn)])
    true_Qk, found_Qk = exact(query_QE, vector_CE, depth)[0], approximate(index, query_QE, vector_CE, depth)[0]
    return float((found_Qk >= true_Qk[:, -1:] - 2 * 10.0**-DECIMALS).mean()), len(query_QE)


def load_faiss() -> Any:
    """The module. Raises UserError that says how to get it."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(f"searching by FAISS needs faiss-cpu: {extra('eval')}; without it a search is exact") from error


def save_faiss(index: Any, path: Path) -> None:
    """Write a FAISS index, complete or not at all."""
    faiss = load_faiss()
    with open_atomic(path) as file:
        writer = faiss.BufferedIOWriter(faiss.PyCallbackIOWriter(file.write))
        faiss.write_index(index, writer)
        del writer  # writes what it holds


def open_faiss(path: Path, digest: str) -> Any:
    """The index that `save_faiss` wrote, into memory. Raises UserError where its SHA-256 is another.

    FAISS trusts what it reads, so nothing else is given to it.
    """
    faiss = load_faiss()
    if not path.exists() or sha256(path) != digest:
        raise UserError(f"{path} is not the file the index was written with; build the index again")
    return faiss.read_index(str(path))
