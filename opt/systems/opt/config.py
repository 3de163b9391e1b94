"""OPT's configuration: sizes, rates and weights. Where the paper is silent the field's help names the gap it fills
(A1 to A22, docs/opt.md)."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Annotated, Literal

from tyro.conf import Fixed, Suppress

from opt.config import UserError
from opt.systems.shared.tuning import Tuning

Mixing = Literal["rows", "steps", "joint"]
ModalityMasking = Literal["paper", "code"]


@dataclass(frozen=True)
class Shares:
    """How often rows (mixing `rows`) or steps (mixing `steps`) draw each task; proportions, on any scale."""

    mlm: float = 1 / 6
    mvm: float = 1 / 6
    mam: float = 1 / 6
    dtr: float = 1 / 6
    dir: float = 1 / 6
    match: float = 1 / 6


@dataclass(frozen=True)
class OPTConfig:
    """Sizes of the three embedders, the cross-modal encoder and the two decoders; rates of corruption; loss weights.

    Raises UserError for values out of range.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    inner: int = 3072
    decoder_layers: int = 6
    """Layers of the text decoder and of the code decoder each; their width is the encoder's (gap A12)."""
    dropout: float = 0.1
    post_norm: bool = False
    """Encoder norms after each sub-layer, as BERT; needed to start from BERT's weights (gap A17)."""
    norm_epsilon: float = 1e-5
    """Added to the variance in the norms of the encoder and the embedders; BERT's weights were made with 1e-12."""
    text_positions: int = 64
    """Longest text in tokens, [CLS] and [SEP] included; longer captions are cut (gap A8)."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut (gaps A6, A8)."""
    mixing: Mixing = "rows"
    """rows: each row of a batch draws one task. steps: each step one task, in random order, as the official code.
    joint: all losses on the same input, as the paper's Figure 1 (gap A1)."""
    shares: Shares = Shares()
    token_rate: float = 0.15
    """Share of words, regions and frames that token-level masking hides (gap A4)."""
    frame_span: int = 1
    """Hidden frames come in runs of so many, at the same rate: neighbouring frames give each other away (gap A5)."""
    modality_rate: float = 0.3
    """Chance that a whole modality is hidden, never all three; at most 0.5 with modality-masking code."""
    modality_masking: ModalityMasking = "code"
    """Where text or codes are written. paper: each modality is hidden independently. code: what is written is always
    hidden, and one of the two others with modality_rate each (gap A2)."""
    drop_rate: float = 0.5
    """Of hidden modalities that no masked token is predicted in, the share left out instead of standing as masks: at
    inference what is missing is left out (gap A3)."""
    pair_rate: float = 0.5
    """Share of matching rows that see two modalities of three, so that pairs can be scored (gap A11)."""
    matching: Literal["sigmoid", "softmax"] = "sigmoid"
    """Five-way matching by five sigmoids (Eq. 11) or by one softmax, as the official code (gap A11)."""
    contrast_temperature: float = 0.1
    """Temperature of the frame contrast (gap A9)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all words or codes where text or codes are written (gap A12)."""
    alignment_weight: float = 0.0
    """Weight of the alignment of text, picture and speech in one space; not in the paper."""
    alignment_width: int = 128
    """Width of that shared space."""
    tuning: Annotated[Tuning, Fixed, Suppress] = Tuning()
    """What the model was fine-tuned for."""

    def __post_init__(self) -> None:
        sizes = ("width", "layers", "heads", "inner", "decoder_layers", "frame_positions", "frame_span",
                 "alignment_width")
        rules = (
            (sizes, "at least 1", lambda value: value >= 1),
            (("text_positions",), "at least 3: [CLS], a word, [SEP]", lambda value: value >= 3),
            (("token_rate", "drop_rate", "pair_rate"), "from 0 to 1", lambda value: 0 <= value <= 1),
            (("dropout", "label_smoothing", "modality_rate"), "at least 0 and below 1", lambda value: 0 <= value < 1),
            (("norm_epsilon", "contrast_temperature"), "above 0", lambda value: value > 0),
            (("alignment_weight",), "at least 0", lambda value: value >= 0),
        )
        wrong = [f"{name.replace('_', '-')} {getattr(self, name)} must be {rule}" for names, rule, holds in rules
                 for name in names if not (math.isfinite(getattr(self, name)) and holds(getattr(self, name)))]
        if self.modality_masking == "code" and 0.5 < self.modality_rate < 1:
            wrong.append(f"modality-rate {self.modality_rate} must be at most 0.5, as each of two modalities is hidden "
                         "at this rate and never both; lower it, or give modality-masking paper")
        shares = astuple(self.shares)
        if not all(0 <= share < math.inf for share in shares) or not any(shares):
            wrong.append(f"shares {', '.join(f'{share:g}' for share in shares)} must be at least 0, and one above 0")
        if wrong:
            raise UserError(f"--model: {'; '.join(wrong)}")
