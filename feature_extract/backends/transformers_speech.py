"""Speech features by a wav2vec 2.0, HuBERT, WavLM or one of their kin in `transformers`: any layer, averaged in time.

Weights: "tiny" (the embedded network), or a folder or hub name, such as facebook/wav2vec2-base. Codes: wav2vec 2.0's
own quantiser, where the checkpoint has it; for the others k-means centroids in the folder, kmeans.npy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from feature_extract.audio import AudioSettings
from feature_extract.media import SAMPLE_RATE
from feature_extract.quantisers import ProductQuantiser, Quantiser, read_centroids
from feature_extract.speech_network import SpeechNetwork, cut_behind
from opt.config import UserError

MODEL_TYPES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "unispeech", "unispeech-sat")
"""Convolutions over the waveform, then a transformer, both by the same names."""
EPSILON = 1e-7
"""Of transformers' Wav2Vec2FeatureExtractor."""
UNUSED = ("masked_spec_embed",)
"""Weights that only training needs, and that some checkpoints lack."""


class TransformersSpeech(SpeechNetwork):
    """A network of transformers: waveform (1, n) -> `last_hidden_state` (1, T, D)."""

    def __init__(
        self, backend: str, weights: str, network: Any, settings: AudioSettings, device: str,
        epsilon: float | None = EPSILON, quantiser: Quantiser | None = None,
    ) -> None:
        stable = getattr(network.config, "do_stable_layer_norm", False)
        cut_behind(settings.layer, weights, network.encoder, norm_at_end=stable)
        network.adapter = None  # behind the last layer, for other tasks: it would thin the frames out
        super().__init__(backend, weights, network, settings, device, epsilon, quantiser)

    def hear(self, waveform_1n: Tensor) -> tuple[Tensor, ...]:
        """The layer's output (T, D) and, with a quantiser, ids (T, G)."""
        output = self.network(waveform_1n)
        hidden_TD = output.last_hidden_state[0]
        return (hidden_TD,) if self.quantiser is None else (hidden_TD, self.quantiser(output))


def load(weights: str, settings: AudioSettings, device: str) -> TransformersSpeech:
    """Open "tiny", a folder or a hub name. Raises UserError when it is none of them, no such network, or has no
    quantiser where codes are asked for.
    """
    if weights == "tiny":
        from feature_extract.tiny.audio import load_audio

        if settings.codes:
            raise UserError("audio 'tiny': the embedded network has no quantiser; leave out --speech-codes")
        return TransformersSpeech("transformers_speech", weights, load_audio().wav2vec2, settings, device)
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, Wav2Vec2ForPreTraining
    from transformers.utils import logging

    logging.set_verbosity_error()  # what is missing is said below, in a sentence
    logging.disable_progress_bar()
    _check_folder(weights)
    try:
        features, config = AutoFeatureExtractor.from_pretrained(weights), AutoConfig.from_pretrained(weights)
        if config.model_type not in MODEL_TYPES or getattr(features, "sampling_rate", None) != SAMPLE_RATE:
            raise UserError(f"audio {weights!r}: a {config.model_type}; expected one of {', '.join(MODEL_TYPES)} "
                            f"that reads waveforms of {SAMPLE_RATE} Hz")
        own_quantiser = settings.codes and config.model_type == "wav2vec2"
        kind: Any = Wav2Vec2ForPreTraining if own_quantiser else AutoModel
        model, report = kind.from_pretrained(weights, config=config, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"audio {weights!r}: {str(error).splitlines()[0]}") from error
    _check_complete(weights, report["missing_keys"])
    network = model.wav2vec2 if own_quantiser else model
    quantiser: Quantiser | None = None
    if own_quantiser:
        quantiser = ProductQuantiser(model.quantizer.weight_proj, model.quantizer.num_groups)
    elif settings.codes:
        quantiser = read_centroids(Path(weights) / "kmeans.npy", config.hidden_size)
    epsilon = EPSILON if features.do_normalize else None
    return TransformersSpeech("transformers_speech", weights, network, settings, device, epsilon, quantiser)


def _check_folder(weights: str) -> None:
    """Raises UserError for a path that is no folder of a network; a name of the hub is none of our business."""
    path = Path(weights)
    if not path.exists() and (path.is_absolute() or weights.startswith((".", "~")) or weights.count("/") > 1):
        raise UserError(f"audio {weights!r}: there is no such folder")
    lacking = [name for name in ("config.json", "preprocessor_config.json") if not (path / name).exists()]
    if path.is_dir() and lacking:
        raise UserError(f"audio {weights!r}: the folder holds no {' and no '.join(lacking)}; save the model and its "
                        "feature extractor there, or copy what the hub has of it")


def _check_complete(weights: str, missing: list[str]) -> None:
    """Raises UserError when weights that matter are missing: transformers would draw them at random."""
    if any(name.startswith("quantizer.") for name in missing):
        raise UserError(f"audio {weights!r}: has no quantiser, so there are no codes; checkpoints of pretraining have "
                        "one (Wav2Vec2ForPreTraining), fine-tuned ones do not: take such a one, or leave out "
                        "--speech-codes")
    lost = sorted(name for name in missing if not name.endswith(UNUSED) and not name.startswith("project_"))
    if lost:
        raise UserError(f"audio {weights!r}: lacks {', '.join(lost[:3])}{' and others' * (len(lost) > 3)}; copy the "
                        "weights anew")
