"""BEiT-3: image as a foreign language (arXiv 2208.10442): one multiway transformer, masked data modelling; its presets.

    config.py   sizes, sharing, rates, the stage
    rows.py     the preparer: samples -> each modality masked by itself and beside others, captions to fill in
    model.py    embedders -> multiway transformer -> heads; forward reads like the paper's Figure 2
    infill.py   captions written word by word: [MASK] behind what stands there, predicted, replaced
"""

import dataclasses

from opt.recipe import LoopConfig, OptimConfig, Stage
from opt.systems.beit3.config import BEiT3Config
from opt.systems.beit3.model import BEiT3
from opt.systems.beit3.rows import CaptionRows, Rows
from opt.systems.shared.config import TINY, TINY_SIGHT
from opt.systems.system import Preset

__all__ = ["BEiT3", "BEiT3Config", "CaptionRows", "Rows", "base", "tiny", "trimodal"]


def base() -> Preset:
    """The released Base and the paper's recipe, at a batch that one machine holds (the paper's has 6,144 sequences).
    It begins with masked modelling alone; `opt stages` goes on with the contrast that retrieval needs. Shards hold
    14 x 14 image codes (`--codes-grid 14`)."""
    return Preset(
        BEiT3Config(stage=_MASKED),
        LoopConfig(steps=1_000_000, batch_tokens=131_072, workers=8, save_every=1000),
        OptimConfig(learning_rate=1e-3, warmup=0.01, final=0.0, weight_decay=0.05),
        vocabulary_size=64_000, stages=(_MASKED, _CONTRAST),
    )


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes. Masked modelling and the contrast are trained together, as a
    sum (ours), so that one run can find; `opt stages` trains one after the other, as the authors do."""
    return Preset(_TINY, LoopConfig(batch_tokens=16_384), stages=(_MASKED, _CONTRAST))


def trimodal() -> Preset:
    """`tiny` with an expert for speech."""
    return Preset(dataclasses.replace(_TINY, hears=True), LoopConfig(batch_tokens=16_384), stages=(_MASKED, _CONTRAST))


_MASKED = Stage("masked", objectives=("masked",), share=0.7)
_CONTRAST = Stage("contrast", objectives=("contrast",), share=0.3)
_TINY = BEiT3Config(TINY_SIGHT, TINY, fused_layers=1, space=128)
