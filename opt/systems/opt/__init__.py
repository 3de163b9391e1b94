"""OPT: Omni-Perception Pre-Trainer (arXiv 2107.00249), and its presets.

    config.py   sizes, rates, weights
    rows.py     the preparer: samples -> corrupted, packed rows
    model.py    embedders -> cross-modal encoder -> heads and decoders; forward reads like the paper's Figure 1
"""

from opt.systems.opt.config import OPTConfig, Shares
from opt.systems.opt.model import OPT
from opt.systems.opt.rows import Rows

__all__ = ["OPT", "OPTConfig", "Rows", "Shares", "base", "tiny"]


def base() -> OPTConfig:
    """The paper's sizes: 12 x 768 encoder, 6-layer decoders, alignment off."""
    return OPTConfig()


def tiny() -> OPTConfig:
    """A small model for two CPU cores and spoken scenes, with alignment on."""
    return OPTConfig(
        width=192, layers=4, heads=4, inner=768, decoder_layers=2, dropout=0.0, drop_rate=1.0, alignment_weight=1.0,
        shares=Shares(mlm=0.15, mvm=0.1, mam=0.1, dtr=0.25, dir=0.25, match=0.15),
    )
