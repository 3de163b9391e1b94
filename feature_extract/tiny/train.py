"""Train one of the embedded networks on spoken scenes, drawn first when absent.

    python -m feature_extract.tiny.train regions --minutes 8
    python -m feature_extract.tiny.train audio --minutes 13
    python -m feature_extract.tiny.train codes --minutes 13

Prints what the network reaches on held-out scenes. The schedule follows the clock, so a faster machine trains longer.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from feature_extract.tiny import weights_file
from feature_extract.tiny.pool import Pool


@dataclass(frozen=True)
class TrainConfig:
    """Which network, where to, how long."""

    network: tyro.conf.Positional[Literal["regions", "audio", "codes"]]
    out: Path | None = None
    """File to write; without it the embedded weights are replaced."""
    scenes: Path = Path("runs/tiny/scenes")
    """Folder of the scenes to train on."""
    minutes: float = 13.0
    seed: int = 0
    threads: int = 1
    workers: int = 2
    """Processes that draw the scenes."""


def main(config: TrainConfig) -> None:
    """Train and measure one network."""
    torch.set_num_threads(config.threads)
    pool = Pool(config.scenes, config.workers)
    out = config.out or weights_file.FOLDER / f"{config.network}.safetensors"
    importlib.import_module(f"feature_extract.tiny.{config.network}").train(pool, config.minutes, config.seed, out)
    print(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(tyro.cli(TrainConfig, description=__doc__))
