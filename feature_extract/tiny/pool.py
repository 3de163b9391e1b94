"""What the embedded networks are trained on: a folder of spoken scenes, and one schedule for all three.

The scenes' seed is far from those users choose, so that nothing evaluated was seen in training.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor, nn

from feature_extract.sources.spoken_scenes import ScenesConfig
from feature_extract.sources.spoken_scenes import scenes as draw_scenes

SEED, SCENES, HELD_OUT = 20_000, 6000, 200


class Pool:
    """Scenes in the Localized Narratives layout, drawn when absent; the first HELD_OUT are for measuring only."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder = folder
        draw_scenes(ScenesConfig(out=folder, train=SCENES, val=0, test=0, seed=SEED, workers=workers))
        self.scenes = _lines(folder / "train_scenes.jsonl")
        first: dict[str, dict] = {}
        for telling in _lines(folder / "train_localized_narratives.jsonl"):
            first.setdefault(telling["image_id"], telling)
        self.tellings = [first[scene["image_id"]] for scene in self.scenes]
        self.held_out, self.rows = np.arange(HELD_OUT), np.arange(HELD_OUT, len(self.scenes))

    def pictures(self, side: int) -> list[np.ndarray]:
        """All pictures, uint8 (side, side, 3)."""
        paths = (self.folder / "images" / f"{scene['image_id']}.jpg" for scene in self.scenes)
        return [np.array(Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
                for path in paths]

    def recordings(self) -> list[np.ndarray]:
        """One recording a scene, float32 at 16 kHz."""
        paths = (self.folder / "voice" / telling["voice_recording"] for telling in self.tellings)
        return [soundfile.read(path, dtype="float32")[0] for path in paths]


@dataclass(frozen=True)
class Step:
    """One batch: row numbers, how far training is (0 to 1), and whether to save after it."""

    rows: np.ndarray
    fraction: float
    save: bool
    optimizer: torch.optim.Optimizer
    losses: list[float]

    def step(self, loss: Tensor, network: nn.Module, clip: float) -> None:
        """Backward, clip, move."""
        self.losses.append(float(loss.detach()))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        self.optimizer.step()


class Schedule:
    """Batches in random order for `minutes`: rate rises for 100 steps and falls by a cosine; saves once a minute."""

    def __init__(self, pool: Pool, size: int, minutes: float, seed: int, optimizer: torch.optim.Optimizer,
                 rate: float, lengths: Sequence[int] | None = None) -> None:
        self.pool, self.size, self.seconds, self.seed = pool, size, 60 * minutes, seed
        self.optimizer, self.rate, self.lengths = optimizer, rate, lengths

    def __iter__(self) -> Iterator[Step]:
        began = saved = time.monotonic()
        step, losses = 0, [0.0]
        while True:
            for rows in self._epoch(step):
                now = time.monotonic()
                fraction = min(1.0, (now - began) / self.seconds)
                if step % 100 == 0:
                    loss = sum(losses[-100:]) / len(losses[-100:])
                    print(f"step {step}, {fraction:.0%} of {self.seconds / 60:g} minutes, loss {loss:.3f}", flush=True)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate * min(1, (step + 1) / 100) * max(
                        0.01, (1 + math.cos(math.pi * fraction)) / 2)
                save = now - saved > 60 or fraction >= 1
                saved = now if save else saved
                yield Step(rows, fraction, save, self.optimizer, losses)
                step += 1
                if fraction >= 1:
                    return

    def _epoch(self, step: int) -> list[np.ndarray]:
        """All training rows once; batches of like length when lengths are given."""
        order = np.random.default_rng((self.seed, step)).permutation(self.pool.rows)
        if self.lengths is not None:
            order = order[np.argsort(np.array(self.lengths)[order], kind="stable")]
        batches = np.array_split(order, max(1, len(order) // self.size))
        return [batches[i] for i in np.random.default_rng((self.seed, step, 1)).permutation(len(batches))]


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
