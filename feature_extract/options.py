"""The options of `opt extract`: the job's own, those of the source that is named, those of the networks, and a profile.

    words of the line --prepare--> which source and profile --tyro--> ExtractConfig --check--> one that makes sense
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
import tyro

from feature_extract import sources
from feature_extract.audio import AudioSettings
from feature_extract.codes import CodeSettings
from feature_extract.profiles import LONGEST, PROFILES
from feature_extract.regions import RegionSettings
from opt.config import UserError

AnySource = TypeVar("AnySource")
FINEST_GRID = 64
"""Rows of image codes: 1,024 pixels a side at 16 of them a code."""


@dataclass(frozen=True)
class ExtractConfig(Generic[AnySource]):
    """What to extract, with which networks, and where to."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Which layout the corpus has: localized_narratives, coco_captions, karpathy, flickr_audio, conceptual_captions,
    visual_genome, vqa_v2, nlvr2, transcripts, class_folders, folder, table or text (docs/sources.md). Named before
    --help, it shows its own options, too."""
    source: tyro.conf.OmitArgPrefixes[AnySource]
    out: Path
    """Folder of the shards; made when absent."""
    profile: Literal["full", "standard", "compact"] = "standard"
    """What is stored: it sets --frames-per-second, --max-frames, --top-classes and --int8 (docs/extraction.md)."""
    regions: str = "tiny"
    """Detector: tiny, none, or BACKEND:WEIGHTS, e.g. torchvision_detector:fasterrcnn_resnet50_fpn_v2:detector.pt"""
    audio: str = "tiny"
    """Speech network: tiny, none, or BACKEND:WEIGHTS, e.g. transformers_speech:facebook/wav2vec2-base"""
    codes: str = "tiny"
    """Image tokenizer: tiny, none, or BACKEND:WEIGHTS, e.g. dvae:codes.safetensors"""
    region: tyro.conf.OmitArgPrefixes[RegionSettings] = field(default_factory=lambda: RegionSettings(top_classes=5))
    speech: tyro.conf.OmitArgPrefixes[AudioSettings] = field(default_factory=AudioSettings)
    image_codes: tyro.conf.OmitArgPrefixes[CodeSettings] = field(default_factory=CodeSettings)
    int8: bool = False
    """Store features as int8 with a scale a row: half the bytes."""
    jpeg: bool = True
    """Store each picture, its short side at most 256, for patch systems and for looking."""
    shard_size: int = 500
    """Rows in a shard: what one worker does at a time, and what a kill can cost."""
    runner: Literal["local", "ray", "static"] = "local"
    """local: processes of this machine. ray: of the cluster that RAY_ADDRESS names. static: this process does one share
    of the shards, told by RANK and WORLD_SIZE or by a SLURM job array."""
    workers: int = 2
    """Processes that extract, each with its own networks; what is written does not depend on their number. 0: this
    process does the work, and nothing watches over it."""
    device: str = "auto"
    """Where the networks run: cpu, cuda, or auto, which is cuda where there is one."""
    row_seconds: float = 600.0
    """A row that takes longer is given up, and stands among the failures."""
    max_failures: int | None = None
    """Stop when more failures than this are counted."""
    retry_failed: bool = False
    """Do the rows again of which something was lost; the others stay as they are."""
    dry_run: bool = False
    """Only say what would be done."""

    @classmethod
    def prepare(cls, argv: list[str]) -> tuple[Any, Any]:
        """The type and values to begin with: the source's own options, and the profile's settings."""
        known = names()
        name = next((word for word in argv if module_name(word) in known), "localized_narratives")
        kind = importlib.import_module(f"{sources.__name__}.{module_name(name)}").Source
        chosen = [after for word, after in itertools.pairwise(argv) if word == "--profile"]
        chosen += [word.partition("=")[2] for word in argv if word.startswith("--profile=")]
        stored = PROFILES.get(chosen[-1] if chosen else "standard", PROFILES["standard"])
        missing: Any = tyro.MISSING
        return ExtractConfig[kind], ExtractConfig(  # type: ignore[valid-type]
            name if name in argv else missing, kind(missing, "train"), missing, int8=stored["int8"],
            region=RegionSettings(top_classes=stored["top_classes"]),
            speech=AudioSettings(frames_per_second=stored["frames_per_second"], max_frames=stored["max_frames"]),
        )


def names() -> list[str]:
    """The sources that can be extracted: modules of feature_extract/sources with a Source."""
    modules = {entry.name: importlib.import_module(f"{sources.__name__}.{entry.name}")
               for entry in pkgutil.iter_modules(sources.__path__)}
    return [name for name, module in modules.items() if dataclasses.is_dataclass(getattr(module, "Source", None))]


def module_name(name: str) -> str:
    """A source's module, whether it is written with hyphens or underscores."""
    return name.replace("-", "_")


def check(config: ExtractConfig) -> None:
    """Raises UserError for a source that is not there, a number out of range, or a corpus that cannot be read."""
    if module_name(config.name) not in names():
        raise UserError(f"{config.name!r}: there is no such source; there are {', '.join(names())}")
    if type(config.source).__module__ != f"{sources.__name__}.{module_name(config.name)}":
        raise UserError(f"another option is called like a source; put the source first: opt extract {config.name} ...")
    for name in ("shard_size", "row_seconds"):
        if not 0 < getattr(config, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0 and finite")
    if config.workers < 0 or (config.workers == 0 and config.runner == "ray"):
        raise UserError(f"--workers {config.workers}: must be at least 0, and at least 1 with --runner ray")
    if config.max_failures is not None and config.max_failures < 0:
        raise UserError(f"--max-failures {config.max_failures}: must be at least 0")
    ranges = {"max_regions": (1, LONGEST), "max_frames": (0, LONGEST), "frames_per_second": (0, 1e6),
              "max_seconds": (0.1, 1e6), "score_threshold": (0, 1), "top_classes": (0, LONGEST),
              "codes_grid": (1, FINEST_GRID)}
    for name, (least, most) in ranges.items():
        value = {**vars(config.region), **vars(config.speech), **vars(config.image_codes)}[name]
        if not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value}: must lie in {least} to {most:g}")
    if not config.source.corpus.exists():
        raise UserError(f"{config.source.corpus} is not there; expected a corpus in the layout {config.name!r}")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file; give a folder, which is made when absent")
    if config.out.resolve() == config.source.corpus.resolve():
        raise UserError(f"--out {config.out} is the corpus itself; choose another folder for the shards")
    config.source.files()


def resolved_device(name: str) -> str:
    """auto resolved; UserError for cuda where there is none."""
    if name not in ("auto", "cpu") and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {name}: not here; `--device cpu` always works, `opt doctor` says what else does")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
