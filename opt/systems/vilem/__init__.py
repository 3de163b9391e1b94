"""ViLEM (CVPR 2023): a dual encoder that learns details from mistakes in texts; and its presets.

    image  [class] patches   -- pre-norm Stack -->                 [class] --Projection--> \\
    text   [CLS] words [SEP] -- lower Stack --> upper Stack -->    [CLS]   --Projection-->  > contrast with a twin's
    audio  [class] frames    -- pre-norm Stack -->                 [class] --Projection--> /  keys and a ring
    texts, each of some words masked by itself --frozen Editor--> other words --> edited texts
    edited text -- lower Stack --> which words are wrong, and what stood there
                     \\-- local: cross-attention onto patches or frames, from several depths of their tower
                     \\-- global: what the picture or speech is as a whole, added to every word, no cross-attention

Retrieval reads a text by the lower and the upper stack alone: cross-attention is never asked, so that it costs nothing.

    config.py     sizes, and what is edited
    rows.py       the preparer: which words are edited, and by which of picture and speech they are judged
    networks.py   towers that are seen at several depths, and texts that are read beside them
    model.py      contrast, edits and what is learned of them
"""

from __future__ import annotations

from opt.data.pixels import Sight
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.shared.config import TINY, TINY_SIGHT, Sizes
from opt.systems.system import Preset
from opt.systems.vilem.config import ViLEMConfig
from opt.systems.vilem.model import ViLEM
from opt.systems.vilem.rows import Rows

__all__ = ["Rows", "ViLEM", "ViLEMConfig", "base", "tiny", "trimodal"]


def base() -> Preset:
    """ViT-B/16, BERT's layers, a BERT that edits (`--start bert:FOLDER` fills all three), and the recipe of the
    authors' code: 512 pairs a step, 20 epochs of 5 million."""
    return Preset(
        ViLEMConfig(Sight(size=224, patch=16, least_area=0.2), editor_share=0.0),
        LoopConfig(steps=200_000, batch_tokens=180_000, workers=8, save_every=1000),
        OptimConfig(learning_rate=2e-4, warmup=0.007, final=0.05, beta2=0.999, weight_decay=0.02),
        vocabulary_size=30_522,
    )


def _tiny(hears: bool) -> Preset:
    config = ViLEMConfig(
        TINY_SIGHT, TINY, Sizes(TINY.width, 2, TINY.heads, TINY.inner), upper_layers=2, audio=TINY, hears=hears,
        editor=Sizes(384, 1, 4, 768), editor_share=0.3, space=128, text_positions=64, dropout=0.0, momentum=0.9,
        ring_rows=512, ramp=0.2,
    )  # an editor that is wide and shallow learns in the fewest steps
    return Preset(config, LoopConfig(batch_tokens=16_384))


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes."""
    return _tiny(hears=False)


def trimodal() -> Preset:
    """`tiny` with a tower for speech."""
    return _tiny(hears=True)
