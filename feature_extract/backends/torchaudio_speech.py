"""Speech features by a bundle of `torchaudio.pipelines`: the last transformer layer, averaged in time.

Weights: the bundle's name, such as WAV2VEC2_BASE, HUBERT_BASE or WAVLM_BASE_PLUS; torchaudio keeps the file it fetches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torchaudio

from feature_extract.audio import AudioSettings, Speech, pool_frames
from feature_extract.description import describe
from feature_extract.media import SAMPLE_RATE
from opt.config import UserError


class TorchaudioSpeech:
    """A speech network with torchaudio's `extract_features`: waveform (1, n) -> one (1, T, D) a layer."""

    def __init__(self, network: Any, weights: str, settings: AudioSettings, device: str = "cpu") -> None:
        self.network = network.eval().requires_grad_(False).to(device)
        self.weights, self.settings, self.device = weights, settings, device

    @torch.inference_mode()
    def __call__(self, waveform: np.ndarray) -> Speech:
        """The features of a waveform (n,) float32 at 16 kHz."""
        layers, _ = self.network.extract_features(torch.from_numpy(waveform)[None].to(self.device))
        return pool_frames(layers[-1][0], len(waveform), self.settings)

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256, settings."""
        return describe("torchaudio_speech", self.weights, self.network, self.settings)


def load(weights: str, settings: AudioSettings, device: str) -> TorchaudioSpeech:
    """Open a bundle by name. Raises UserError when there is none of that name or its file cannot be had."""
    bundle = getattr(torchaudio.pipelines, weights, None)
    if not isinstance(bundle, torchaudio.pipelines.Wav2Vec2Bundle):
        known = [name for name in torchaudio.pipelines.__all__ if isinstance(getattr(torchaudio.pipelines, name),
                                                                            torchaudio.pipelines.Wav2Vec2Bundle)]
        raise UserError(f"audio {weights!r}: torchaudio has no such bundle; it has {', '.join(known)}")
    if bundle.sample_rate != SAMPLE_RATE:
        raise UserError(f"audio {weights!r}: reads {bundle.sample_rate:g} Hz, recordings are read at {SAMPLE_RATE}")
    try:
        return TorchaudioSpeech(bundle.get_model(), weights, settings, device)
    except OSError as error:
        raise UserError(f"audio {weights!r}: its file could not be fetched ({error})") from error
