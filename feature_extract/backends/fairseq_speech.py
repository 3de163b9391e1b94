"""Speech features by a wav2vec 2.0 or HuBERT checkpoint of fairseq, without fairseq: any layer, averaged in time.

Weights: the .pt file, pretrained or fine-tuned with CTC. Codes: wav2vec 2.0's own quantiser, in pretrained checkpoints;
for the others k-means centroids beside the file, NAME.kmeans.npy.
"""

from __future__ import annotations

from pathlib import Path

import torch

from feature_extract.audio import AudioSettings
from feature_extract.backends.transformers_speech import TransformersSpeech
from feature_extract.quantisers import ProductQuantiser, Quantiser, read_centroids
from opt.config import UserError
from opt.weights import fairseq

EPSILON = 1e-5
"""Of the layer norm with which fairseq standardises waveforms."""


def load(weights: str, settings: AudioSettings, device: str) -> TransformersSpeech:
    """Open a checkpoint. Raises UserError when it is none, or has no quantiser where codes are asked for."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    path = Path(weights)
    read = fairseq.read(path)
    config = Wav2Vec2Config(**read.settings)
    try:
        with torch.device("meta"):
            network = Wav2Vec2Model(config)
        network.load_state_dict(read.weights, assign=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"audio {weights!r}: its weights and settings do not fit together ({reason})") from error
    quantiser: Quantiser | None = None
    if settings.codes and read.quantiser:
        quantiser = ProductQuantiser(_linear(read.quantiser), read.groups)
    elif settings.codes:
        quantiser = read_centroids(path.with_suffix(".kmeans.npy"), config.hidden_size)
    epsilon = EPSILON if read.normalise else None
    return TransformersSpeech("fairseq_speech", weights, network, settings, device, epsilon, quantiser)


def _linear(state: dict[str, torch.Tensor]) -> torch.nn.Linear:
    """The layer of these weights."""
    out_features, in_features = state["weight"].shape
    layer = torch.nn.Linear(in_features, out_features)
    layer.load_state_dict(state)
    return layer
