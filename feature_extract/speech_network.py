"""A speech extractor of any wav2vec 2.0-like network: what all backends of speech share.

    waveform --standardise, windows--> convolutions, transformer cut behind a layer, quantiser --frames, ids--> Speech

Shape legend: T frames, D feature width, G codebooks, n samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feature_extract.audio import AudioSettings, Speech, pool_frames, standardise
from feature_extract.description import describe
from feature_extract.media import SAMPLE_RATE
from feature_extract.quantisers import Quantiser
from feature_extract.windows import (
    FrameGrid,
    RecordingNorm,
    frame_grid,
    hear_in_windows,
    norm_of_recording,
    plan_windows,
    recording_norm,
)
from opt.config import UserError


class SpeechNetwork(ABC):
    """An AudioExtractor. `network.feature_extractor.conv_layers` are its convolutions, in transformers and torchaudio.

    epsilon: what is added to the variance of a waveform when it is standardised; None: it is taken as it is.
    quantiser: gives the ids of frames (quantisers.py); None when no codes are wanted.
    """

    def __init__(
        self, backend: str, weights: str, network: nn.Module, settings: AudioSettings, device: str,
        epsilon: float | None, quantiser: Quantiser | None = None,
    ) -> None:
        self.backend, self.weights, self.settings, self.device, self.epsilon = (
            backend, weights, settings, device, epsilon)
        layers: Any = network.get_submodule("feature_extractor.conv_layers")
        if isinstance(layers[0].layer_norm, nn.GroupNorm):
            layers[0].layer_norm = recording_norm(layers[0].layer_norm)
        self.network = network.eval().requires_grad_(False).to(device)
        self.quantiser = None if quantiser is None else quantiser.eval().requires_grad_(False).to(device)
        self.codebooks: tuple[int, ...] = () if quantiser is None else quantiser.codebooks
        self.first_layer = layers[0]
        self.grid: FrameGrid = frame_grid(layer.conv for layer in layers)
        self.window, self.context = _window_frames(settings, self.grid)

    @abstractmethod
    def hear(self, waveform_1n: Tensor) -> tuple[Tensor, ...]:
        """The layer's output (T, D) and, with a quantiser, ids (T, G)."""

    @torch.inference_mode()
    def __call__(self, waveform: np.ndarray) -> Speech:
        """The features of a waveform (n,) float32 at 16 kHz."""
        heard = waveform if self.epsilon is None else standardise(waveform, self.epsilon)
        waveform_1n = torch.from_numpy(heard)[None].to(self.device)
        frames = self.grid.frames(len(waveform))
        windows = plan_windows(frames, self.window or frames, self.context)
        if len(windows) == 1:
            hidden_TD, *codes_TG = (output.cpu() for output in self.hear(waveform_1n))
        else:
            norm = self.first_layer.layer_norm
            whole = (norm_of_recording(norm, self.first_layer.conv, waveform_1n)
                     if isinstance(norm, RecordingNorm) else nullcontext())
            with whole:
                hidden_TD, *codes_TG = hear_in_windows(self.hear, waveform_1n, self.grid, windows)
        return pool_frames(hidden_TD, codes_TG[0] if codes_TG else None, len(waveform), self.grid.stride, self.settings)

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256 (of what runs: blocks behind the layer are cut off), settings."""
        both = nn.ModuleDict({"network": self.network, "quantiser": self.quantiser}) if self.quantiser else self.network
        return describe(self.backend, self.weights, both, self.settings)


def _window_frames(settings: AudioSettings, grid: FrameGrid) -> tuple[int, int]:
    """A window and its context in frames; no window at all is (0, 0). Raises UserError for one with nothing to keep."""
    if not settings.window_seconds:
        return 0, 0
    window = grid.frames(round(settings.window_seconds * SAMPLE_RATE))
    context = round(settings.context_seconds * SAMPLE_RATE / grid.stride)
    if window <= 2 * context:
        raise UserError(f"window_seconds {settings.window_seconds:g} has {window} frames, and a context of {context} "
                        "on both sides leaves none of them; make it longer")
    return window, context


def cut_behind(layer: int, weights: str, transformer: Any, norm_at_end: bool) -> None:
    """Drop the blocks of `transformer` that `layer` does not need (AudioSettings), and the norm behind the last one.

    `norm_at_end`: its `layer_norm` stands behind the blocks, not before them. Raises UserError for a layer that it has
    not.
    """
    if layer == -1:
        return
    if not 0 <= layer <= len(transformer.layers):
        raise UserError(f"audio {weights!r}, layer {layer}: it has 0 (what enters the first block) to "
                        f"{len(transformer.layers)}, and -1 (what it hands on)")
    transformer.layers = transformer.layers[:layer]
    if norm_at_end:
        transformer.layer_norm = nn.Identity()
