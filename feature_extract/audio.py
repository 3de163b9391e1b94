"""What a speech extractor is: a waveform to features, and if wanted codes, averaged in time to a stated rate.

A backend is a module `backends/NAME.py` with `load(weights, settings, device) -> AudioExtractor`.
Shape legend: T frames, D feature width, G codebooks, n samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from feature_extract.media import SAMPLE_RATE
from opt.config import UserError


@dataclass(frozen=True)
class AudioSettings:
    """What is stored of a recording, and from where in the network it is taken (docs/speech.md)."""

    frames_per_second: float = 10.0
    """Frames of a second of speech; 0: as many as the network gives."""
    max_frames: int = 256
    """A recording that would have more is averaged more coarsely; 0: no limit."""
    max_seconds: float = 300.0
    """A longer recording is refused, and only its caption stored."""
    layer: int = -1
    """Layer of the speech network: -1 what it hands on, 0 what enters its first block, N what leaves block N."""
    window_seconds: float = 30.0
    """A longer recording is heard in overlapping windows of that length; 0: whole, however long it is."""
    context_seconds: float = 2.5
    """What a window hears before and after the part that is kept of it."""
    codes: Annotated[bool, tyro.conf.arg(name="speech-codes")] = False
    """Store the ids of the speech network's quantiser too, where it has one."""

    def __post_init__(self) -> None:
        if self.window_seconds and not 0 < 2 * self.context_seconds < self.window_seconds < math.inf:
            raise UserError(f"window_seconds {self.window_seconds:g}, context_seconds {self.context_seconds:g}: a "
                            "window must be longer than twice its context; make it longer, or 0 to hear recordings "
                            "whole")


@dataclass(frozen=True)
class Speech:
    """features (T, D) float16 at `frame_rate` frames a second; `seconds` of recording.

    codes (T, G) int16: quantiser ids, a row a frame; None when not asked for.
    """

    features: np.ndarray
    frame_rate: float
    seconds: float
    codes: np.ndarray | None = None


class AudioExtractor(Protocol):
    """Batch-invariant: one recording a call. `codebooks`: entries of each codebook, () when it gives no codes."""

    settings: AudioSettings
    codebooks: tuple[int, ...]

    def __call__(self, waveform: np.ndarray) -> Speech:
        """The features of a waveform (n,) float32 at 16 kHz."""

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256 and the settings: enough to build the same extractor again."""


def standardise(waveform: np.ndarray, epsilon: float) -> np.ndarray:
    """Zero mean and unit variance. transformers adds an `epsilon` of 1e-7 to the variance, fairseq 1e-5."""
    return ((waveform - waveform.mean()) / np.sqrt(waveform.var() + epsilon)).astype(np.float32)


def pool_frames(
    hidden_TD: Tensor, codes_TG: Tensor | None, samples: int, stride: int, settings: AudioSettings
) -> Speech:
    """Features of a recording of `samples` at 16 kHz, a frame every `stride`, averaged to the stored rate.

    At least one frame. `frame_rate` is the stated rate, or the network's own, unless the recording would have more
    frames than `max_frames` or than the network. A stored frame's codes are those in the middle of what it averages.
    """
    seconds, own = samples / SAMPLE_RATE, len(hidden_TD)
    rate = settings.frames_per_second or SAMPLE_RATE / stride
    wanted = max(1, round(seconds * rate)) if settings.frames_per_second else own
    frames = min(wanted, settings.max_frames or wanted, own)
    pooled_DT = F.adaptive_avg_pool1d(hidden_TD.float().T, frames)
    middles = (2 * torch.arange(frames) + 1) * own // (2 * frames)
    return Speech(
        pooled_DT.T.cpu().numpy().astype(np.float16),
        rate if frames == wanted else frames / seconds,
        seconds,
        None if codes_TG is None else codes_TG[middles].numpy().astype(np.int16),
    )
