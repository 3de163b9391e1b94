"""BLIP: Bootstrapping Language-Image Pre-training (arXiv 2201.12086), and its presets.

    config.py     sizes and weights of the parts
    rows.py       the preparer: captions as they are read, and as they are written
    networks.py   the text network in its three functions, and the towers beside it
    model.py      contrast, matching and writing; forward reads like the paper's Figure 2
"""

from __future__ import annotations

import dataclasses

from opt.data.pixels import Sight
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.blip.config import BLIPConfig
from opt.systems.blip.model import BLIP
from opt.systems.blip.rows import Rows
from opt.systems.shared.config import TINY, TINY_SIGHT
from opt.systems.system import Preset

__all__ = ["BLIP", "BLIPConfig", "Rows", "base", "tiny", "trimodal"]


def base() -> Preset:
    """ViT-B/16 and the authors' recipe: 20 epochs of 14 M pictures, about 2,400 to a batch (their rate falls by a tenth
    an epoch, to 0.12 of its height)."""
    return Preset(
        BLIPConfig(sight=Sight(size=224, patch=16, least_area=0.2)),
        LoopConfig(steps=117_000, batch_tokens=786_432, accumulate=16, multiple=16, workers=8, save_every=1000),
        OptimConfig(learning_rate=3e-4, warmup=0.026, decay="linear", final=0.12, beta2=0.999, weight_decay=0.05),
        vocabulary_size=30_524,
    )


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes."""
    return Preset(BLIPConfig(TINY_SIGHT, TINY, TINY, space=128, text_positions=64, dropout=0.0, momentum=0.9,
                             ring_rows=512, ramp=0.2), LoopConfig(batch_tokens=16_384))


def trimodal() -> Preset:
    """`tiny` with a tower for speech."""
    preset = tiny()
    return dataclasses.replace(preset, model=dataclasses.replace(preset.model, hears=True))
