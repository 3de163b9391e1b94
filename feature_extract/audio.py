"""What a speech extractor is: a waveform to features, averaged in time to a stated rate.

A backend is a module `backends/NAME.py` with `load(weights, settings, device) -> AudioExtractor`.
Shape legend: T frames, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from feature_extract.media import SAMPLE_RATE


@dataclass(frozen=True)
class AudioSettings:
    """frames_per_second: the stored rate. max_frames: a recording that would have more is averaged more coarsely.

    max_seconds: a longer recording is refused.
    """

    frames_per_second: float = 10.0
    max_frames: int = 256
    max_seconds: float = 300.0


@dataclass(frozen=True)
class Speech:
    """features (T, D) float16 at `frame_rate` frames a second; `seconds` of recording."""

    features: np.ndarray
    frame_rate: float
    seconds: float


class AudioExtractor(Protocol):
    """Batch-invariant: one recording a call."""

    settings: AudioSettings

    def __call__(self, waveform: np.ndarray) -> Speech:
        """The features of a waveform (n,) float32 at 16 kHz."""

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256 and the settings: enough to build the same extractor again."""


def standardise(waveform: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance, as wav2vec 2.0's feature extractor does (transformers, `do_normalize`)."""
    return ((waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)).astype(np.float32)


def pool_frames(hidden_TD: Tensor, samples: int, settings: AudioSettings) -> Speech:
    """Features of a recording of `samples` at 16 kHz, averaged to the stored rate, or to fewer frames: at least one.

    `frame_rate` is the stated rate, unless the recording would have more frames than `max_frames` or than the network.
    """
    seconds = samples / SAMPLE_RATE
    wanted = max(1, round(seconds * settings.frames_per_second))
    frames = min(wanted, settings.max_frames, len(hidden_TD))
    pooled = F.adaptive_avg_pool1d(hidden_TD.float().T, frames).T.cpu().numpy().astype(np.float16)
    return Speech(pooled, settings.frames_per_second if frames == wanted else frames / seconds, seconds)
