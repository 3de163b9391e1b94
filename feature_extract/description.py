"""What an extractor says of itself: which backend, which weights, which settings. It goes into the manifest."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from opt import config as configuration


def describe(backend: str, weights: str, network: nn.Module, settings: Any | None = None) -> dict[str, Any]:
    """The description as JSON-ready values; `settings` is a dataclass."""
    return {
        "backend": backend,
        "weights": weights,
        "weights_sha256": weights_sha256(network),
        "settings": {} if settings is None else configuration.to_dict(settings),
    }


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers: the same wherever they were read from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
