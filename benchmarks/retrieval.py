"""Two-stage retrieval against matching every pair, on scenes nobody has seen; and a search of COCO's size.

    python benchmarks/retrieval.py [--model runs/hard/model] [--scenes 1000]

    fresh scenes --opt extract--> shards --Searches.all_pairs-->           R@1, fusion passes, seconds
                                        \\--aligned, two_stage, k = 1..50--> the same, k by k
    random unit vectors, 5,000 pictures and 25,000 captions --eval.ranking.rank, both ways--> seconds, peak memory

Baseline: matching of all pairs by the same model in the same run. A model that `opt finetune retrieval-hard` has tuned
is one whose matching can be trusted with all of them. Prints one JSON line, the same as OUT/retrieval.json:
`fewer_passes`, `r1_all_pairs`, `r1_two_stage` (text -> image, k as --rerank), `seconds_5k_25k`, and the curve.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.ranking import rank
from eval.retrieval import DIRECTIONS, RetrievalConfig, open_searches
from eval.searches import Search
from eval.task import open_task
from opt import cli
from opt.checkpoint import from_pretrained
from opt.files import write_atomic

FIRST = (1, 2, 5, 10, 20, 50)
"""Candidates matched again: the curve's places."""
PICTURES, CAPTIONS, WIDTH = 5_000, 25_000, 256
WAYS = ("text_to_image", "image_to_text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/hard/model"), help="a model that embeds and matches")
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"))
    parser.add_argument("--scenes", type=int, default=1000, help="fresh scenes, made and extracted once")
    parser.add_argument("--seed", type=int, default=7, help="of the fresh scenes; the demo's is 1")
    parser.add_argument("--rerank", type=int, default=20, help="the k of `r1_two_stage` and `fewer_passes`")
    parser.add_argument("--largest", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.largest:
        print(json.dumps(largest()))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    shards = _fresh(given.out, given.scenes, given.seed, from_pretrained(given.model).facts.frame_rate)
    figures = {**compared(given.model, shards, given.out, given.rerank), **_apart()}
    line = json.dumps(figures | {"scenes": given.scenes, "seed": given.seed, "threads": torch.get_num_threads()})
    write_atomic(given.out / "retrieval.json", (line + "\n").encode())
    print(line)


def compared(model: Path, shards: Path, out: Path, rerank: int) -> dict[str, Any]:
    """R@1, passes and seconds of all pairs, of alignment, and of two stages at each k, in both directions."""
    ways: dict[str, dict[str, Any]] = {}
    every = _Timed(model, shards, out, 1)
    for way in WAYS:  # the second direction asks for pairs that the first has scored
        ways[way] = {"all_pairs": every(way, lambda searches, *given: searches.all_pairs(*given))}
    for first in sorted({*FIRST, rerank}):
        for way in WAYS:
            two = _Timed(model, shards, out, first)  # nothing kept: what one direction costs by itself
            ways[way][str(first)] = two(
                way, lambda searches, *given: searches.two_stage(*given, searches.aligned(*given))
            )
    chosen = ways["text_to_image"]
    return {
        "gigabytes": _peak(),
        "fewer_passes": round(chosen["all_pairs"]["fusion_passes"] / chosen[str(rerank)]["fusion_passes"], 1),
        "r1_all_pairs": chosen["all_pairs"]["r1"], "r1_two_stage": chosen[str(rerank)]["r1"], "rerank": rerank,
        "curve": ways,
    }  # fmt: skip


class _Timed:
    """Searches of a freshly opened split, each with what it found and what it cost."""

    def __init__(self, model: Path, shards: Path, out: Path, rerank: int) -> None:
        config = RetrievalConfig(model, shards, out=out, rerank=rerank)
        self.searches = open_searches(open_task("retrieval", "retrieval", config), config)

    def __call__(self, way: str, search: Any) -> dict[str, Any]:
        matching, began = self.searches.matching, time.perf_counter()
        fused, alone = matching.fusion_passes, matching.single_passes
        found: Search = search(self.searches, *DIRECTIONS[way])
        embedded = sum(len(vectors) for vectors in self.searches.vectors.values())
        return {
            "r1": round(float((found.ranks <= 1).mean()), 4), "r5": round(float((found.ranks <= 5).mean()), 4),
            "fusion_passes": matching.fusion_passes - fused, "kept_states": matching.single_passes - alone,
            "embedded": embedded, "seconds": round(time.perf_counter() - began, 2), "queries": len(found.queries),
        }  # fmt: skip


def largest() -> dict[str, Any]:
    """COCO's size: every caption searches the pictures, every picture the captions. Embedding is excluded."""
    random = np.random.default_rng(0)
    pictures, captions = (_unit(random.standard_normal((count, WIDTH))) for count in (PICTURES, CAPTIONS))
    picture, caption = np.arange(PICTURES), np.repeat(np.arange(PICTURES), CAPTIONS // PICTURES)
    before, began = _peak(), time.perf_counter()
    rank(pictures, captions, picture, caption, 10, seed=0)
    halfway = time.perf_counter()
    rank(captions, pictures, caption, picture, 10, seed=0)
    ended = time.perf_counter()
    return {
        "seconds_5k_25k": round(ended - began, 2), "seconds_image_to_text": round(halfway - began, 2),
        "gigabytes_5k_25k": _peak(), "gigabytes_before": before, "width": WIDTH,
    }  # fmt: skip


def _peak() -> float:
    """Most memory that this process has held, in GB. (What getrusage says begins with its parent's.)"""
    kilobytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return round(int(kilobytes[1]) / 2**20, 2) if kilobytes else float("nan")


def _apart() -> dict[str, Any]:
    """`largest` in a process of its own, so that the peak of memory is its own."""
    ran = subprocess.run([sys.executable, __file__, "--largest"], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _fresh(out: Path, scenes: int, seed: int, rate: float) -> Path:
    """Scenes and their features; what is made is not made again."""
    raw, shards = out / "scenes", out / "shards"
    for words in (
        ("scenes", "--out", raw, "--train", 0, "--val", 0, "--test", scenes, "--seed", seed, "--workers", 2),
        ("extract", "localized_narratives", raw, "--split", "test", "--out", shards, "--workers", 2,
         "--frames-per-second", rate),
    ):
        if status := cli.main([str(word) for word in words]):
            raise SystemExit(status)
    return shards


if __name__ == "__main__":
    main()
