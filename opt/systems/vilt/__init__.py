"""ViLT: Vision-and-Language Transformer without convolution or region supervision (arXiv 2102.03334), and its presets.

    config.py   sizes, rates, weights
    rows.py     the preparer: samples -> masked rows and matching rows, packed for one encoder run
    model.py    embedders -> one encoder -> heads; forward reads like the paper's Figure 3
"""

import dataclasses

from opt.recipe import LoopConfig, OptimConfig
from opt.systems.shared.config import TINY, TINY_SIGHT
from opt.systems.system import Preset
from opt.systems.vilt.config import ViLTConfig
from opt.systems.vilt.model import ViLT
from opt.systems.vilt.rows import Rows

__all__ = ["Rows", "ViLT", "ViLTConfig", "base", "tiny", "trimodal"]


def base() -> Preset:
    """ViLT-B/32 and the paper's recipe: about 4,096 pairs a step, two sequences each (docs/systems.md)."""
    return Preset(
        ViLTConfig(),
        LoopConfig(steps=100_000, batch_tokens=1_700_000, workers=8, save_every=1000),
        OptimConfig(learning_rate=1e-4, warmup=0.025, decay="linear", final=0.0),
        vocabulary_size=30_522,
    )


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes."""
    return Preset(_TINY, LoopConfig(batch_tokens=16_384))


def trimodal() -> Preset:
    """`tiny` that reads speech beside the text, with the contrast of what each modality is by itself."""
    return Preset(dataclasses.replace(_TINY, hears=True, contrast_weight=1.0), LoopConfig(batch_tokens=16_384))


_TINY = ViLTConfig(dataclasses.replace(TINY_SIGHT, fit="keep", longest=64), TINY, space=128, dropout=0.0,
                   text_positions=64, most_patches=0)
