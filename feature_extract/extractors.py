"""The three extractors of a job: opened from the command line's words, or again from a manifest's description.

    tiny | none | BACKEND:WEIGHTS --open_extractors--> Extractors --describe--> manifest --load_extractors--> Extractors

A backend is a module under `backends/`, found by its name.
"""

from __future__ import annotations

import importlib
import pkgutil
import typing
from pathlib import Path
from typing import Any, NamedTuple

from feature_extract import backends
from feature_extract.audio import AudioExtractor, AudioSettings
from feature_extract.codes import USUAL, CodeExtractor, CodeSettings
from feature_extract.regions import RegionExtractor, RegionSettings
from opt import config as configuration
from opt.config import UserError
from opt.data.manifest import Manifest

TINY_BACKENDS = {"regions": "torchvision_detector", "audio": "transformers_speech", "codes": "dvae"}
"""The backend of the embedded network of each kind."""
KINDS: dict[type[Any], str] = {RegionSettings: "regions", AudioSettings: "audio", CodeSettings: "codes"}
"""What a backend makes, by the settings that its `load` takes."""


class Extractors(NamedTuple):
    """One extractor of each kind; None where a kind is not wanted."""

    regions: RegionExtractor | None
    audio: AudioExtractor | None
    codes: CodeExtractor | None

    def describe(self) -> dict[str, dict[str, Any]]:
        """The description of each kind that is there, for the manifest."""
        return {kind: one.describe() for kind, one in self._asdict().items() if one is not None}


def open_extractors(
    regions: str, audio: str, codes: str, region_settings: RegionSettings, audio_settings: AudioSettings, device: str,
    code_settings: CodeSettings = USUAL,
) -> Extractors:
    """Open each by its word. Raises UserError naming the word when there is no such backend or weights."""
    return _build(
        {
            "regions": {**_parse("regions", regions), "settings": configuration.to_dict(region_settings)},
            "audio": {**_parse("audio", audio), "settings": configuration.to_dict(audio_settings)},
            "codes": {**_parse("codes", codes), "settings": configuration.to_dict(code_settings)},
        },
        device,
    )


def load_extractors(manifest: Manifest, device: str = "cpu") -> Extractors:
    """The extractors that made these shards, for raw pictures and recordings, and for looking at generated codes.

    Raises UserError when weights can no longer be had, or are others than then.
    """
    return reopen(manifest.extractors, device)


def reopen(descriptions: dict[str, dict[str, Any]], device: str) -> Extractors:
    """Extractors from `Extractors.describe`; UserError where they would describe themselves otherwise now."""
    try:
        extractors = _build(descriptions, device)
    except UserError as error:
        raise UserError(f"the networks that made the shards cannot be opened: {error}") from error
    for kind, now in extractors.describe().items():
        then = descriptions[kind]
        if now["weights_sha256"] != then["weights_sha256"]:
            raise UserError(
                f"{kind}: the weights {now['weights']!r} are not those that made the shards (SHA-256 "
                f"{now['weights_sha256'][:12]}, then {then['weights_sha256'][:12]}); put those back, or extract again"
            )
        if differ := [name for name in now if now[name] != then.get(name)]:
            raise UserError(f"{kind}: {differ[0]} is {now[differ[0]]}, the shards were made with {then.get(differ[0])} "
                            "by another version; install that one, or extract again")
    return extractors


def _build(descriptions: dict[str, dict[str, Any]], device: str) -> Extractors:
    """One extractor for each description that names a backend."""
    built: dict[str, Any] = dict.fromkeys(KINDS.values())
    for settings_type, kind in KINDS.items():
        about = descriptions.get(kind, {})
        if about.get("backend"):
            settings: Any = configuration.from_dict(settings_type, about.get("settings", {}), f"{kind} settings")
            built[kind] = _backend(kind, about["backend"]).load(about["weights"], settings, device)
    return Extractors(**built)


def _parse(kind: str, word: str) -> dict[str, Any]:
    """tiny, none or BACKEND:WEIGHTS as the beginning of a description."""
    if word == "none":
        return {}
    backend, _, weights = (TINY_BACKENDS[kind], "", "tiny") if word == "tiny" else word.partition(":")
    if not weights:
        raise UserError(f"--{kind} {word}: expected tiny, none, or BACKEND:WEIGHTS, such as {TINY_BACKENDS[kind]}:...")
    return {"backend": backend, "weights": _whole_paths(weights)}


def _whole_paths(weights: str) -> str:
    """The word with its relative paths made whole, so that it means the same from any folder."""
    def whole(piece: str) -> str:
        path, comma, options = piece.partition(",")
        return f"{Path(path).absolute()}{comma}{options}" if path and path != "tiny" and Path(path).exists() else piece

    return whole(weights) if Path(weights).exists() else ":".join(map(whole, weights.split(":")))


def _backend(kind: str, name: str) -> Any:
    """The backend's module. Raises UserError when there is none of that name and kind, or a package is missing."""
    known = [module.name for module in pkgutil.iter_modules(backends.__path__)]
    try:
        module = importlib.import_module(f"{backends.__name__}.{name}") if name in known else None
    except ImportError as error:
        raise UserError(f"--{kind} {name}: {error}; `opt doctor` says how to mend it") from error
    if module is None or _makes(module) != kind:
        fitting = [one for one in known if _makes(importlib.import_module(f"{backends.__name__}.{one}")) == kind]
        raise UserError(f"--{kind} {name}: there is no such backend; there are {', '.join(fitting)}")
    return module


def _makes(module: Any) -> str:
    """Which kind of extractor a backend makes, by the settings that its `load` takes."""
    return KINDS[typing.get_type_hints(module.load)["settings"]]
