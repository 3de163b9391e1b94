"""OPT's configuration: sizes, rates and weights, each with its source where the paper is silent (gaps A1..A22)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """Mixing `rows`: the share of a batch's rows that draw each task (design: one task a row, one encoder run)."""

    mlm: float = 1 / 6
    mvm: float = 1 / 6
    mam: float = 1 / 6
    dtr: float = 1 / 6
    dir: float = 1 / 6
    match: float = 1 / 6


@dataclass(frozen=True)
class OPTConfig:
    """Sizes of the three embedders, the cross-modal encoder and the two decoders; rates of corruption; loss weights."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    inner: int = 3072
    decoder_layers: int = 6
    """Layers of the text decoder and of the code decoder each (gap A12)."""
    dropout: float = 0.1
    post_norm: bool = False
    """Norms after each sub-layer, as BERT; needed to start from BERT's weights (gap A17)."""
    text_positions: int = 64
    """Longest text in tokens, [CLS] and [SEP] included; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    token_rate: float = 0.15
    """Share of words, regions and frames that token-level masking hides."""
    modality_rate: float = 0.3
    """Chance that a whole modality is hidden (never all three)."""
    drop_rate: float = 0.5
    """Of hidden modalities that are no target, the share left out instead of standing as masks (gap A3)."""
    pair_rate: float = 0.5
    """Share of matching rows that see two modalities instead of three, so that pairs can be scored."""
    contrast_temperature: float = 0.1
    """Temperature of the frame contrast (gap A9)."""
    alignment_weight: float = 0.0
    """Weight of the alignment of text, picture and speech in one space; not in the paper."""
    alignment_width: int = 128
    """Width of that shared space."""
    shares: Shares = Shares()
