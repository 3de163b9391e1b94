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


class AudioExtractor(Protocol):
    """Batch-invariant: one recording a call."""

    settings: AudioSettings

    def __call__(self, waveform: np.ndarray) -> np.ndarray:
        """Waveform (n,) float32 at 16 kHz -> features (T, D) float16."""

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256 and the settings: enough to build the same extractor again."""


def standardise(waveform: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance, as wav2vec 2.0's feature extractor does (transformers, `do_normalize`)."""
    return ((waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)).astype(np.float32)


def pool_frames(hidden_TD: Tensor, samples: int, settings: AudioSettings) -> np.ndarray:
    """Features of a recording of `samples` at 16 kHz, averaged to the stored rate: (T', D) float16, T' >= 1."""
    wanted = round(samples / SAMPLE_RATE * settings.frames_per_second)
    frames = max(1, min(wanted, settings.max_frames, len(hidden_TD)))
    return F.adaptive_avg_pool1d(hidden_TD.float().T, frames).T.cpu().numpy().astype(np.float16)
