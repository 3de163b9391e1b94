"""Speech features by a wav2vec 2.0, HuBERT or WavLM of `transformers`: the last hidden layer, averaged in time.

Weights: "tiny" (the embedded network), or a folder or hub name that `AutoModel` opens, such as facebook/wav2vec2-base.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from feature_extract.audio import AudioSettings, Speech, pool_frames, standardise
from feature_extract.description import describe
from feature_extract.media import SAMPLE_RATE
from opt.config import UserError


class TransformersSpeech:
    """A speech network: waveform (1, n) -> `last_hidden_state` (1, T, D)."""

    def __init__(
        self, network: nn.Module, normalise: bool, weights: str, settings: AudioSettings, device: str = "cpu"
    ) -> None:
        self.network = network.eval().requires_grad_(False).to(device)
        self.normalise, self.weights, self.settings, self.device = normalise, weights, settings, device

    @torch.inference_mode()
    def __call__(self, waveform: np.ndarray) -> Speech:
        """The features of a waveform (n,) float32 at 16 kHz."""
        heard = standardise(waveform) if self.normalise else waveform
        hidden_TD = self.network(torch.from_numpy(heard)[None].to(self.device)).last_hidden_state[0]
        return pool_frames(hidden_TD, len(waveform), self.settings)

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256, settings."""
        return describe("transformers_speech", self.weights, self.network, self.settings)


def load(weights: str, settings: AudioSettings, device: str) -> TransformersSpeech:
    """Open "tiny", a folder or a hub name. Raises UserError when it is none of them, or no 16 kHz speech network."""
    if weights == "tiny":
        from feature_extract.tiny.audio import load_audio

        return TransformersSpeech(load_audio().wav2vec2, True, weights, settings, device)
    from transformers import AutoFeatureExtractor, AutoModel

    try:
        features = AutoFeatureExtractor.from_pretrained(weights)
        network = AutoModel.from_pretrained(weights)
    except (OSError, ValueError) as error:
        raise UserError(f"audio {weights!r}: {str(error).splitlines()[0]}") from error
    if getattr(features, "sampling_rate", None) != SAMPLE_RATE or not hasattr(features, "do_normalize"):
        raise UserError(f"audio {weights!r}: not a network that reads waveforms of {SAMPLE_RATE} Hz")
    return TransformersSpeech(network, features.do_normalize, weights, settings, device)
