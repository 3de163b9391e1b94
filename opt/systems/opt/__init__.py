"""OPT: Omni-Perception Pre-Trainer (arXiv 2107.00249), and its presets.

    config.py   sizes, rates, weights
    rows.py     the preparer: samples -> corrupted, packed rows
    model.py    embedders -> cross-modal encoder -> heads and decoders; forward reads like the paper's Figure 1
"""

from opt.recipe import LoopConfig, OptimConfig
from opt.systems.opt.config import OPTConfig, Shares
from opt.systems.opt.model import OPT
from opt.systems.opt.rows import Rows
from opt.systems.system import Preset

__all__ = ["OPT", "OPTConfig", "Rows", "Shares", "paper", "small", "tiny"]


def paper() -> Preset:
    """The paper's sizes and recipe (docs/opt.md): 12 x 768 encoder as BERT, 6-layer decoders, alignment off."""
    return Preset(
        OPTConfig(post_norm=True, norm_epsilon=1e-12, text_positions=128, modality_masking="paper"),
        LoopConfig(steps=100_000, batch_tokens=10_240, save_every=1000),
        OptimConfig(learning_rate=5e-5, clip=5.0),
        vocabulary_size=30_522,
    )


def small() -> Preset:
    """About 15 million parameters: a real model for one small GPU, with alignment on."""
    return Preset(
        OPTConfig(width=256, layers=6, heads=4, inner=1024, decoder_layers=3, text_positions=128, alignment_weight=1.0,
                  drop_rate=1.0, shares=_SHARES),
        LoopConfig(steps=50_000, batch_tokens=16_384, save_every=1000),
        OptimConfig(learning_rate=5e-4),
        vocabulary_size=8_000,
    )


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes, with alignment on."""
    return Preset(
        OPTConfig(width=192, layers=4, heads=4, inner=768, decoder_layers=2, dropout=0.0, alignment_weight=1.0,
                  drop_rate=1.0, shares=_SHARES),
    )


_SHARES = Shares(mlm=0.15, mvm=0.1, mam=0.1, dtr=0.25, dir=0.25, match=0.15)
"""More writing than masking: with alignment on, [CLS] has a teacher of its own."""
