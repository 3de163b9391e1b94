"""Speech features by a bundle of `torchaudio.pipelines`: any layer, averaged in time.

Weights: the bundle's name, such as WAV2VEC2_BASE, HUBERT_BASE or WAVLM_BASE_PLUS; torchaudio keeps the file it fetches.
"""

from __future__ import annotations

import pickle
from typing import Any

import torchaudio
from torch import Tensor

from feature_extract.audio import AudioSettings
from feature_extract.media import SAMPLE_RATE
from feature_extract.speech_network import SpeechNetwork, cut_behind
from opt.config import UserError

EPSILON = 1e-5
"""Of the layer norm with which torchaudio standardises waveforms."""


class TorchaudioSpeech(SpeechNetwork):
    """A network of torchaudio, without its head: waveform (1, n) -> (1, T, D). `normalise`: standardise waveforms."""

    def __init__(self, weights: str, network: Any, settings: AudioSettings, device: str, normalise: bool) -> None:
        network.aux = None  # the head of speech recognition
        transformer = network.encoder.transformer
        cut_behind(settings.layer, weights, transformer, norm_at_end=not transformer.layer_norm_first)
        super().__init__("torchaudio_speech", weights, network, settings, device, EPSILON if normalise else None)

    def hear(self, waveform_1n: Tensor) -> tuple[Tensor, ...]:
        """The layer's output (T, D)."""
        hidden_1TD, _ = self.network(waveform_1n)
        return (hidden_1TD[0],)


def load(weights: str, settings: AudioSettings, device: str) -> TorchaudioSpeech:
    """Open a bundle by name. Raises UserError when there is none of that name, its file cannot be had, or codes are
    asked for.
    """
    bundle = getattr(torchaudio.pipelines, weights, None)
    if not isinstance(bundle, torchaudio.pipelines.Wav2Vec2Bundle):
        known = [name for name in torchaudio.pipelines.__all__ if isinstance(getattr(torchaudio.pipelines, name),
                                                                            torchaudio.pipelines.Wav2Vec2Bundle)]
        raise UserError(f"audio {weights!r}: torchaudio has no such bundle; it has {', '.join(known)}")
    if bundle.sample_rate != SAMPLE_RATE:
        raise UserError(f"audio {weights!r}: reads {bundle.sample_rate:g} Hz, recordings are read at {SAMPLE_RATE}")
    if settings.codes:
        raise UserError(f"audio {weights!r}: torchaudio's bundles hold no quantiser; leave out the codes, or read the "
                        "network with transformers_speech or fairseq_speech")
    try:
        model = bundle.get_model(dl_kwargs={"weights_only": True})
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"audio {weights!r}: its file could not be fetched ({str(error).splitlines()[0]})") from error
    network = getattr(model, "model", model)  # some are wrapped with what is done to the waveform and the words
    return TorchaudioSpeech(weights, network, settings, device, getattr(model, "normalize_waveform", False))
