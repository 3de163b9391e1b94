"""VLMo: unified vision-language pre-training with mixture-of-modality-experts (arXiv 2111.02358), and its presets.

    config.py      sizes, experts, rates, the stages
    rows.py        the preparer: samples -> each modality by itself and masked sequences, packed for one run
    model.py       embedders -> one transformer of experts -> heads; what each stage asks and trains
"""

import dataclasses

from opt.recipe import LoopConfig, OptimConfig
from opt.systems.shared.config import TINY, TINY_SIGHT
from opt.systems.system import Preset
from opt.systems.vlmo.config import LANGUAGE, PAIRS, VISION, VLMoConfig
from opt.systems.vlmo.model import VLMo
from opt.systems.vlmo.rows import Rows

__all__ = ["Rows", "VLMo", "VLMoConfig", "base", "tiny", "trimodal"]

STAGES = (VISION, LANGUAGE, PAIRS)


def base() -> Preset:
    """VLMo-Base and the paper's recipe: about 1,024 pairs a step. The paper's stages have corpora of their own."""
    return Preset(
        VLMoConfig(),
        LoopConfig(steps=400_000, batch_tokens=490_000, workers=8, save_every=1000),
        OptimConfig(learning_rate=2e-4, warmup=0.1, decay="linear", final=0.0),
        vocabulary_size=30_522, stages=STAGES,
    )  # fmt: skip


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes."""
    return Preset(_TINY, LoopConfig(batch_tokens=16_384), stages=STAGES)


def trimodal() -> Preset:
    """`tiny` with an expert of speech, the fourth."""
    return Preset(dataclasses.replace(_TINY, hears=True), LoopConfig(batch_tokens=16_384), stages=STAGES)


_TINY = VLMoConfig(TINY_SIGHT, TINY, fused_layers=1, layer_scale=1.0, space=128, text_positions=64)
"""LayerScale begins at 1: small factors are for deep stacks, and these four layers learned half as fast from 0.1."""
