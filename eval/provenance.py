"""What a result was measured with, gathered from the model's folder, the shards and the machine."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eval.result import Provenance, code_version
from opt.checkpoint import read_history
from opt.data.shards import ShardReader
from opt.data.split import keys_sha256
from opt.history import regime
from opt.systems.system import System

PACKAGES = ("torch", "numpy", "tokenizers")


def provenance_of(
    model: Path, system: System, reader: ShardReader, keys: Sequence[str], seed: int, command: str
) -> Provenance:
    """model: its folder. keys: of the samples that are evaluated, all or the first of the reader's."""
    manifest, history = reader.manifest, read_history(model)
    part = manifest.split
    return Provenance(
        system=system.name,
        model_sha256=json.loads((model / "config.json").read_text())["sha256"],
        split_sha256=reader.fingerprint,
        samples=len(keys),
        seed=seed,
        command=command,
        code_version=code_version(),
        tiny_networks=tiny_networks(manifest.extractors),
        extractors=manifest.extractors,
        split=part.name if part else "",
        part=part.part if part else "",
        split_keys_sha256=keys_sha256(keys),
        origins=manifest.origins,
        trained_on=history,
        regime=regime(history, manifest.origins),
        precision=str(next(system.parameters()).dtype).removeprefix("torch."),
        text_limit=getattr(system.config, "text_positions", None) if system.reads_text else None,
        packages={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        device=_device(system.device),
    )


def narrowed(provenance: Provenance, keys: Sequence[str]) -> Provenance:
    """For an evaluation that uses other samples than those it was opened with: their number and their keys' hash."""
    return dataclasses.replace(provenance, samples=len(keys), split_keys_sha256=keys_sha256(keys))


def tiny_networks(extractors: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Which features come from the embedded tiny networks, by what the manifest says of their extractors."""
    return tuple(kind for kind, about in extractors.items() if about.get("weights") == "tiny")


def _device(device: torch.device) -> str:
    """A graphics card by its name, a processor by its architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
