"""Retrieval between pictures, text and speech: recall at 1, 5 and 10 in five directions.

    samples --system.embed--> unit vectors --matrix product--> rank of the right candidate by alignment alone
                                               \\--first k--> system.score of every pair --> rank by matching (ALBEF)

A query is one caption or recording, or one distinct picture; a hit is any candidate with the query's key, so that each
of several narrations of a picture is right.
Shape legend: Q queries, C candidates, k re-ranked candidates, E embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from eval.metrics import chance_recall, normalise, ranks
from eval.result import Findings, Metric, measured
from eval.task import EvalConfig, Split, Task, in_batches, open_task
from opt.config import UserError
from opt.data.record import Sample
from opt.systems.system import MODALITIES, compose

DIRECTIONS = {
    "text_to_image": (("text",), "image"),
    "image_to_text": (("image",), "text"),
    "text_to_audio": (("text",), "audio"),
    "audio_to_text": (("audio",), "text"),
    "text_audio_to_image": (("text", "audio"), "image"),
}
DEPTHS = (1, 5, 10)
GAIN = "retrieval.gain.text_audio_over_text"
CHUNK = 1024
DECIMALS = 5
"""Scores are compared after rounding: the same caption in another batch differs in the last bits, and is a tie."""
SHOWN_QUERIES, SHOWN_CANDIDATES = 6, 5


@dataclass
class RetrievalConfig(EvalConfig):
    """Options of `opt eval retrieval`."""

    rerank: int = 20
    """How many of the best candidates are scored again by matching; 0 for none."""
    rerank_directions: tuple[str, ...] = ("text_to_image", "image_to_text")
    """Directions that are re-ranked: each query costs `rerank` passes of the cross-modal encoder."""


class Search(NamedTuple):
    """One direction: sample numbers of queries (Q,) and candidates (C,), ranks (Q,), places of the first k (Q, k)."""

    queries: np.ndarray
    candidates: np.ndarray
    ranks: np.ndarray
    first: np.ndarray


@dataclass
class Embeddings:
    """Unit vectors of the samples that were asked for, kept by modalities so that each is computed once."""

    task: Task
    kept: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)

    def of(self, modalities: tuple[str, ...], numbers: np.ndarray) -> np.ndarray:
        """(len(numbers), E) float32. The same modalities always come with the same numbers."""
        if modalities not in self.kept:
            embed = self.task.system.embed
            label = f"embed {' + '.join(modalities)}"
            self.kept[modalities] = self.task.tensor(numbers, lambda samples: embed(samples, modalities), label)
        return self.kept[modalities]


def retrieval(config: RetrievalConfig) -> None:
    """Search between pictures, text and speech: recall at 1, 5 and 10.

    Example: opt eval retrieval runs/demo/model runs/demo/shards/test --rerank 20
    """
    if unknown := sorted(set(config.rerank_directions) - set(DIRECTIONS)):
        raise UserError(f"--rerank-directions {unknown[0]} is no direction; there are {', '.join(DIRECTIONS)}")
    if config.rerank < 0:
        raise UserError(f"--rerank {config.rerank} must not be negative")
    task = open_task("retrieval", "retrieval", config)
    task.finish(measure(task, config))


def measure(task: Task, config: RetrievalConfig) -> Findings:
    """Metrics, absent ones with reasons, and example searches. Raises UserError when no direction can be measured."""
    metrics: list[Metric] = []
    absent: dict[str, str] = {}
    examples: list[dict[str, Any]] = []
    searches: dict[str, Search] = {}
    embeddings, matching = Embeddings(task), Matching(task)
    for direction, (given, sought) in DIRECTIONS.items():
        try:
            search = searches[direction] = _search(task, config, embeddings, given, sought)
        except LookupError as error:
            absent[f"retrieval.{direction}"] = str(error)
            continue
        about = _about(task.split, direction, search)
        metrics += _recalls(task, config, direction, "", search, search.ranks, about)
        if config.rerank and direction in config.rerank_directions:
            best = search._replace(first=search.first[:, : config.rerank])
            reranked = matching.ranks(best, given, sought)
            about = {**about, "rerank_k": best.first.shape[1]}
            metrics += _recalls(task, config, direction, "_reranked", search, reranked, about)
        if direction == "text_to_image":
            examples = _examples(task, search)
    if reason := absent.get("retrieval.text_audio_to_image") or absent.get("retrieval.text_to_image"):
        absent[GAIN] = reason
    else:
        metrics += _gains(task, config, searches["text_audio_to_image"], searches["text_to_image"])
    if not metrics:
        raise UserError("nothing to search: " + "; ".join(sorted(set(absent.values()))))
    return Findings(metrics, absent, examples)


def members(split: Split, modalities: Sequence[str]) -> np.ndarray:
    """Sample numbers that stand for `modalities`: every caption and recording, but each picture once."""
    numbers = split.with_all(modalities)
    return split.one_a_picture(numbers) if tuple(modalities) == ("image",) else numbers


def _search(task: Task, config: RetrievalConfig, embeddings: Embeddings, given: tuple[str, ...], sought: str) -> Search:
    """Embed and rank. Raises LookupError with the reason when there is nothing to search."""
    groups = task.split.groups
    queries, candidates = members(task.split, given), members(task.split, (sought,))
    answerable = np.isin(groups[queries], groups[candidates])
    if not answerable.any():
        raise LookupError(f"the shards hold no {' and '.join(given)} with {sought}")
    query_QE = embeddings.of(given, queries)[answerable]
    candidate_CE = embeddings.of((sought,), candidates)
    queries = queries[answerable]
    depth = min(max(config.rerank, SHOWN_CANDIDATES), len(candidates))
    shuffled = np.random.default_rng(config.seed).permutation(
        len(candidates)
    )  # equals at the cut: no order is favoured
    rank, first = [], []
    for start in range(0, len(queries), CHUNK):
        rows = slice(start, start + CHUNK)
        scores_QC = np.round(query_QE[rows] @ candidate_CE.T, DECIMALS)
        rank.append(ranks(scores_QC, groups[queries[rows], None] == groups[candidates]))
        first.append(shuffled[np.argsort(-scores_QC[:, shuffled], axis=1, kind="stable")[:, :depth]])
    return Search(queries, candidates, np.concatenate(rank), np.concatenate(first))


class Matching:
    """Matching scores of pairs; a pair that two directions ask for is computed once."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.scores: dict[tuple[str, int, int], float] = {}

    def ranks(self, search: Search, given: tuple[str, ...], sought: str) -> np.ndarray:
        """Ranks (Q,) when the first k candidates are ordered by matching alone; others keep their rank, below those."""
        groups = self.task.split.groups
        found_Qk = search.candidates[search.first]
        pairs = [(query, found) for query, row in zip(search.queries, found_Qk, strict=True) for found in row]
        scores_Qk = np.round(self._score(pairs, given, sought), DECIMALS).reshape(found_Qk.shape)
        rank_Q = ranks(scores_Qk, groups[found_Qk] == groups[search.queries, None])
        return np.where(np.isfinite(rank_Q), rank_Q, search.ranks)

    def _score(self, pairs: list[tuple[int, int]], given: tuple[str, ...], sought: str) -> np.ndarray:
        """Log-odds (len(pairs),) that the query's modalities and the candidate belong together."""
        modalities = tuple(modality for modality in MODALITIES if modality in (*given, sought))
        flip = len(given) == 1 and given[0] > sought
        keys = [("+".join(modalities), *(pair[::-1] if flip else pair)) for pair in pairs]
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self.scores}
        sample = lru_cache(maxsize=2048)(self.task.split.sample)

        def load(query: int, found: int) -> Sample:
            return compose(**{modality: sample(query) for modality in given}, **{sought: sample(found)})

        answers = in_batches(
            [partial(load, *pair) for pair in missing.values()],
            lambda samples: self.task.system.score(samples, modalities).float().cpu().tolist(),
            self.task.batch,
            f"match {' + '.join(given)} with {sought}",
        )
        self.scores.update(zip(missing, answers, strict=True))
        return np.array([self.scores[key] for key in keys])


def _about(split: Split, direction: str, search: Search) -> dict[str, Any]:
    """The protocol of a direction, for its metrics."""
    given, sought = DIRECTIONS[direction]
    count = len(search.candidates)
    what = {"image": "distinct pictures", "text": "captions", "audio": "recordings"}[sought]
    candidates = f"{count} {what}"
    if "text" in (*given, sought):
        numbers = search.candidates if sought == "text" else search.queries
        # a set a text: its pictures; more than one and nobody can tell them apart
        pictures: dict[str, set[int]] = {}
        for number in numbers:
            pictures.setdefault(normalise(split.captions[number] or ""), set()).add(int(split.groups[number]))
        shared = sum(len(pictures[normalise(split.captions[number] or "")]) > 1 for number in numbers)
        candidates += f"; {shared} of {len(numbers)} captions also belong to another picture"
    return {
        "modalities": (*given, sought),
        "direction": f"{' + '.join(given)} -> {sought}",
        "candidates": candidates,
        "normaliser": "caption as stored, the model's own tokenizer",
    }


def _recalls(
    task: Task,
    config: RetrievalConfig,
    direction: str,
    suffix: str,
    search: Search,
    rank: np.ndarray,
    about: dict[str, Any],
) -> list[Metric]:
    groups = task.split.groups
    right = Counter(groups[search.candidates].tolist())
    positives = np.array([right[group] for group in groups[search.queries].tolist()])
    return [
        measured(
            f"retrieval.{direction}.r{depth}{suffix}",
            (rank <= depth).astype(np.float64),
            config.seed,
            groups=groups[search.queries],
            chance=chance_recall(positives, len(search.candidates), depth),
            chance_method="random order",
            **about,
        )
        for depth in DEPTHS
    ]


def _gains(task: Task, config: RetrievalConfig, both: Search, text: Search) -> list[Metric]:
    """Recall of the picture by caption and recording minus recall by the caption alone, same queries (OPT, Table 3)."""
    queries = np.intersect1d(both.queries, text.queries)
    ranks_with, ranks_without = (search.ranks[np.isin(search.queries, queries)] for search in (both, text))
    return [
        measured(
            f"{GAIN}.r{depth}",
            (ranks_with <= depth).astype(np.float64) - (ranks_without <= depth),
            config.seed,
            groups=task.split.groups[queries],
            modalities=("text", "audio", "image"),
            direction="text + audio -> image, minus text -> image",
            candidates=f"{len(both.candidates)} distinct pictures",
            note="paired difference over the same queries",
        )
        for depth in DEPTHS
    ]


def _examples(task: Task, search: Search) -> list[dict[str, Any]]:
    """The first queries with the pictures found for them, best first."""
    keys, captions = task.split.keys, task.split.captions
    shown = []
    for row, query in enumerate(search.queries[:SHOWN_QUERIES]):
        found = search.candidates[search.first[row, :SHOWN_CANDIDATES]]
        hits = [{"picture": task.keep_picture(int(number)), "right": keys[number] == keys[query]} for number in found]
        shown.append({"key": keys[query], "text": captions[query], "rank": float(search.ranks[row]), "found": hits})
    return shown
