"""Retrieval between pictures, text and speech: recall at 1, 5 and 10 in twelve directions.

    samples --System.embed--> unit vectors --products--> rank of the right candidate by alignment
                                               \\--first k--> pairs fused --> rank by matching: two-stage (ALBEF)
    samples -------------------------------------------> all pairs fused --> rank by matching: all-pairs

A query is one caption, one recording, one distinct picture, or two of these of one sample. A hit is any candidate with
the query's key, so that each of several narrations of a picture is right.
Shape legend: Q queries, C candidates, k re-ranked candidates, E embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eval.lookup.nearest import load_faiss
from eval.matching import Matching
from eval.metrics import interval, resampled
from eval.protocols import PROTOCOLS
from eval.provenance import narrowed
from eval.ranking import chance_recall
from eval.result import Findings, Metric, measured
from eval.searches import SHOWN, Modalities, Search, Searches
from eval.task import EvalConfig, Split, Task, open_task
from eval.words import normalise
from opt.config import UserError

DIRECTIONS: dict[str, tuple[Modalities, Modalities]] = {
    "text_to_image": (("text",), ("image",)),
    "image_to_text": (("image",), ("text",)),
    "text_to_audio": (("text",), ("audio",)),
    "audio_to_text": (("audio",), ("text",)),
    "text_audio_to_image": (("text", "audio"), ("image",)),
    "image_to_audio": (("image",), ("audio",)),
    "audio_to_image": (("audio",), ("image",)),
    "text_image_to_audio": (("text", "image"), ("audio",)),
    "image_audio_to_text": (("image", "audio"), ("text",)),
    "image_to_text_audio": (("image",), ("text", "audio")),
    "audio_to_text_image": (("audio",), ("text", "image")),
    "text_to_image_audio": (("text",), ("image", "audio")),
}
"""Queries and what is searched; the paper's five first (OPT, Table 3)."""
Way = Literal["alignment", "two-stage", "all-pairs"]
SUFFIX = {"alignment": "", "two-stage": "_two_stage", "all-pairs": "_all_pairs"}
DEPTHS = (1, 5, 10)
GAIN = "retrieval.gain.text_audio_over_text"
MEAN = "retrieval.image_text.mean"
BOTH_WAYS = ("image_to_text", "text_to_image")
EXAMPLES = 6
"""Searches shown, the first and the worst."""


@dataclass
class RetrievalConfig(EvalConfig):
    """Options of `opt eval retrieval`."""

    by: tuple[Way, ...] = ("alignment", "two-stage")
    """What orders candidates. alignment: vectors of each side alone. two-stage: the first by alignment, ordered again
    by matching. all-pairs: matching of every query with every candidate, which few splits are small enough for."""
    rerank: int | None = None
    """two-stage: how many of the first are ordered again; by default 20, or what the protocol says."""
    faiss: str | None = None
    """two-stage: a FAISS factory that finds the first, such as HNSW32, as `opt index` has it; left out: exactly."""
    directions: tuple[str, ...] = tuple(DIRECTIONS)
    """Which of the twelve directions are searched."""
    matched_directions: tuple[str, ...] = BOTH_WAYS
    """Those of them in which pairs are matched: every pair costs a pass of the cross-modal encoder."""
    protocol: str = ""
    """A published way to search: coco-5k, coco-1k, flickr30k or openimages-5k; checks that this is its split."""


def retrieval(config: RetrievalConfig) -> None:
    """Search between pictures, text and speech: recall at 1, 5 and 10.

    Examples, the second over all pairs, the third as COCO's test split is quoted:

    opt eval retrieval runs/demo/model runs/demo/shards/test --rerank 20

    opt eval retrieval runs/demo/model runs/demo/shards/test --by all-pairs --directions text_to_image --limit 100

    opt eval retrieval runs/coco/model runs/coco/shards/test --protocol coco-5k
    """
    for name, directions in (("directions", config.directions), ("matched-directions", config.matched_directions)):
        if unknown := sorted(set(directions) - set(DIRECTIONS)):
            raise UserError(f"--{name} {unknown[0]} is no direction; there are {', '.join(DIRECTIONS)}")
    if config.rerank is not None and config.rerank < 1:
        raise UserError(f"--rerank {config.rerank} must be at least 1; to order nothing again give --by alignment")
    if not config.by:
        raise UserError(f"--by is empty: give one or more of {', '.join(SUFFIX)}")
    if "two-stage" not in config.by and (unread := [name for name in ("rerank", "faiss") if getattr(config, name)]):
        raise UserError(f"--{unread[0]} is of two-stage search: name two-stage in --by, or leave it out")
    if config.faiss is not None:
        load_faiss()  # where it is missing, that is said before the work
    if config.protocol and config.protocol not in PROTOCOLS:
        raise UserError(f"--protocol {config.protocol} is unknown; there are {', '.join(PROTOCOLS)}")
    task = open_task("retrieval", "retrieval", config)
    task.finish(measure(task, config))


def open_searches(task: Task, config: RetrievalConfig) -> Searches:
    """The samples that the protocol keeps, or all. Raises UserError where the split is not the protocol's."""
    count = len(task.split)
    numbers, folds, rerank = np.arange(count), np.zeros(count, np.int64), 20
    if config.protocol:
        protocol = PROTOCOLS[config.protocol]
        numbers, rerank = protocol.narrow(task.split), protocol.rerank
        folds = protocol.folds_of(task.split)
        task.provenance = narrowed(task.provenance, [task.split.keys[number] for number in numbers])
    return Searches(task, numbers, folds, config.rerank or rerank, config.faiss, Matching(task))


def measure(task: Task, config: RetrievalConfig) -> Findings:
    """Recall in each direction, and example searches. Raises UserError when no direction can be measured."""
    setting, ways = open_searches(task, config), config.by
    found: dict[tuple[str, str], Search] = {}
    absent: dict[str, str] = {}
    for direction in config.directions:
        try:
            able, refused = _ways(setting, config, direction)
        except LookupError as error:
            absent[f"retrieval.{direction}"] = str(error)
            continue
        absent |= refused
        found |= {(direction, way): search for way, search in _searches(setting, direction, able).items()}
    if not found:
        reason = next(iter(absent.values()), "no direction of --directions is in --matched-directions")
        more = len(absent) - 1
        others = f"; nor is there what {more} other direction{'s need' if more > 1 else ' needs'}" if more > 0 else ""
        raise UserError(f"nothing to search: {reason}{others}")
    shared = _captions_of_several_pictures(task.split)
    metrics = [metric for key, search in found.items() for metric in _recalls(setting, config, *key, search, shared)]
    both, text = (found.get((direction, "alignment")) for direction in ("text_audio_to_image", "text_to_image"))
    if both is not None and text is not None:
        metrics += _gains(task, both, text)
    elif "alignment" in ways:
        missing = (absent.get(f"retrieval.{name}{ending}") for name in ("text_audio_to_image", "text_to_image")
                   for ending in ("", ".r1"))
        absent[GAIN] = next(filter(None, missing), "one of the two directions was not asked for")
    for way, suffix in SUFFIX.items():
        if all((direction, way) in found for direction in BOTH_WAYS):
            k = setting.rerank if way == "two-stage" else None
            metrics.append(_mean(task, [found[direction, way] for direction in BOTH_WAYS], suffix, k))
    shown = next((found["text_to_image", way] for way in ways if ("text_to_image", way) in found), None)
    examples, worst = ([], []) if shown is None else (_first(task, shown), _worst(task, shown))
    return Findings(metrics, absent, examples, worst)


def _ways(setting: Searches, config: RetrievalConfig, direction: str) -> tuple[list[Way], dict[str, str]]:
    """The ways asked for in which the system can search, and by the names of figures what it says to the others.

    Raises LookupError with the reason where there is nothing to find, or no way is left.
    """
    given, sought = DIRECTIONS[direction]
    setting.pairs(given, sought)
    asked = [way for way in config.by if way == "alignment" or direction in config.matched_directions]
    embeds = "" if asked == ["all-pairs"] else setting.refusal("embed", given) or setting.refusal("embed", sought)
    scores = "" if asked == ["alignment"] else setting.refusal("score", (*given, *sought))
    says = {"alignment": embeds, "two-stage": embeds or scores, "all-pairs": scores}
    able = [way for way in asked if not says[way]]
    if asked and not able:
        hint = "; --by all-pairs asks for matching alone" if "two-stage" in asked and not scores else ""
        raise LookupError(f"{says[asked[0]]}{hint}")
    return able, {
        f"retrieval.{direction}.r{depth}{SUFFIX[way]}": says[way] for way in asked if says[way] for depth in DEPTHS
    }


def _searches(setting: Searches, direction: str, ways: Sequence[Way]) -> dict[str, Search]:
    """One direction by each of the ways."""
    (given, sought), found = DIRECTIONS[direction], {}
    if "alignment" in ways or "two-stage" in ways:
        found["alignment"] = setting.aligned(given, sought)
    if "two-stage" in ways:
        found["two-stage"] = setting.two_stage(given, sought, found["alignment"])
    if "all-pairs" in ways:
        found["all-pairs"] = setting.all_pairs(given, sought)
    return {way: found[way] for way in ways}


def _captions_of_several_pictures(split: Split) -> np.ndarray:
    """Which samples' captions, as words, also belong to another picture: nobody could tell them apart. bool (N,)."""
    words = np.array([normalise(caption or "") for caption in split.captions])
    text = np.unique(words, return_inverse=True)[1].astype(np.int64)
    pairs = np.unique(np.stack([text, split.groups], axis=1), axis=0)
    return (np.bincount(pairs[:, 0]) > 1)[text]


def _recalls(
    setting: Searches, config: RetrievalConfig, direction: str, way: str, search: Search, shared: np.ndarray
) -> list[Metric]:
    """Recall at each depth, with its protocol."""
    task, (given, sought) = setting.task, DIRECTIONS[direction]
    groups, folds = task.split.groups, setting.folds
    right = Counter(zip(folds[search.candidates].tolist(), groups[search.candidates].tolist(), strict=True))
    offered = Counter(folds[search.candidates].tolist())
    asked = zip(folds[search.queries].tolist(), groups[search.queries].tolist(), strict=True)
    positives = np.array([right[pair] for pair in asked])
    about: dict[str, Any] = {
        "chance_method": "random order",
        "modalities": (*given, *sought),
        "direction": f"{' + '.join(given)} -> {' + '.join(sought)}",
        "candidates": _candidates(sought, offered, search, shared if "text" in (*given, *sought) else None),
        "protocol": "recall/ties-shared",
        "normaliser": "caption as stored, the model's own tokenizer",
        "note": _note(setting, config, way, search),
        "rerank_k": min(setting.rerank, search.first.shape[1]) if way == "two-stage" else None,
    }
    return [
        measured(
            f"retrieval.{direction}.r{depth}{SUFFIX[way]}", (search.ranks <= depth).astype(np.float64),
            task.provenance.seed, groups=groups[search.queries],
            chance=chance_recall(positives, min(offered.values()), depth), **about,
        )
        for depth in DEPTHS
    ]  # fmt: skip


def _candidates(sought: Modalities, offered: Counter[int], search: Search, shared: np.ndarray | None) -> str:
    """What was searched: how many of what, in how many folds, and how many captions nobody could tell apart."""
    what: dict[Modalities, str] = {("image",): "distinct pictures", ("text",): "captions", ("audio",): "recordings"}
    said = f"{min(offered.values())} {what.get(sought, f'pairs of {chr(32).join(sought)}')}"
    if len(offered) > 1:
        said = f"{said} in each of {len(offered)} folds"
    if shared is None:
        return said
    numbers = search.candidates if "text" in sought else search.queries
    return f"{said}; {int(shared[numbers].sum())} of {len(numbers)} captions also belong to another picture"


def _note(setting: Searches, config: RetrievalConfig, way: str, search: Search) -> str:
    """How the split is quoted, what finds the first candidates, and what the way costs."""
    queries, folds = len(search.queries), len(np.unique(setting.folds[search.queries]))
    pairs = {"two-stage": min(setting.rerank, search.first.shape[1]), "all-pairs": len(search.candidates) // folds}
    passes = f"{queries * pairs[way]:,} fusion passes" if way in pairs else ""
    first = f"first stage by FAISS, {config.faiss}" if way == "two-stage" and config.faiss else ""
    weight = setting.task.system.cosine_weight
    scored = f"pairs by log-odds of matching + {weight:.3g} x cosine" if weight else "pairs by log-odds of matching"
    parts = (config.protocol, first, scored if way in pairs else "", passes)
    return "; ".join(part for part in parts if part)


def _gains(task: Task, both: Search, text: Search) -> list[Metric]:
    """Recall of the picture by caption and recording minus recall by the caption alone, same queries (OPT, Table 3)."""
    queries = np.intersect1d(both.queries, text.queries)
    ranks_with, ranks_without = (search.ranks[np.isin(search.queries, queries)] for search in (both, text))
    return [
        measured(
            f"{GAIN}.r{depth}",
            (ranks_with <= depth).astype(np.float64) - (ranks_without <= depth),
            task.provenance.seed,
            groups=task.split.groups[queries],
            modalities=("text", "audio", "image"),
            direction="text + audio -> image, minus text -> image",
            candidates=f"{len(both.candidates)} distinct pictures",
            protocol="recall/ties-shared",
            note="paired difference over the same queries",
        )
        for depth in DEPTHS
    ]


def _mean(task: Task, searches: Sequence[Search], suffix: str, k: int | None) -> Metric:
    """The mean of the six recalls between pictures and captions, over paired resamples of the pictures."""
    groups, seed = task.split.groups, task.provenance.seed
    hits = [((search.ranks <= depth).astype(np.float64), groups[search.queries])
            for search in searches for depth in DEPTHS]  # fmt: skip
    draws = np.mean([resampled(hit, seed, groups=group) for hit, group in hits], axis=0)
    return Metric(
        f"{MEAN}{suffix}", float(np.mean([hit.mean() for hit, _ in hits])), sum(len(s.queries) for s in searches),
        interval(draws), rerank_k=k, modalities=("text", "image"), direction="image -> text and text -> image",
        candidates=" and ".join(str(len(search.candidates)) for search in searches), protocol="recall/ties-shared",
        note="mean of R@1, R@5 and R@10 both ways",
    )  # fmt: skip


def _first(task: Task, search: Search) -> list[dict[str, Any]]:
    """The first queries with the pictures found for them, best first."""
    return [_example(task, search, row) for row in range(min(EXAMPLES, len(search.queries)))]


def _worst(task: Task, search: Search) -> list[dict[str, Any]]:
    """The queries whose picture came last, with what came first and the picture they meant."""
    rows = np.argsort(-search.ranks, kind="stable")[:EXAMPLES]
    by_group = {int(task.split.groups[number]): int(number) for number in search.candidates}
    return [
        {
            **_example(task, search, int(row)),
            "picture": task.keep_picture(by_group[int(task.split.groups[search.queries[row]])]),
            "failure": f"the right picture at rank {search.ranks[row]:g} of {len(search.candidates)}",
        }
        for row in rows
        if search.ranks[row] > 1
    ]


def _example(task: Task, search: Search, row: int) -> dict[str, Any]:
    keys, query = task.split.keys, search.queries[row]
    found = search.first[row, :SHOWN]
    hits = [{"picture": task.keep_picture(int(number)), "right": keys[number] == keys[query]} for number in found]
    return {"key": keys[query], "text": task.split.captions[query], "rank": float(search.ranks[row]), "found": hits}
