"""`opt extract`: a source of pictures, captions and recordings to a folder of shards.

    source --read--> rows --plan--> work items, one a shard --runner--> shards and receipts --> manifest.json, last

The same command again goes on where it stopped: a shard with a receipt is done. Which rows make a shard is fixed by the
source, so a row that fails leaves its neighbours where they are.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

from feature_extract import local_runner, sources
from feature_extract.audio import AudioSettings
from feature_extract.extractors import Extractors, open_extractors
from feature_extract.local_runner import Row, Setup, WorkItem
from feature_extract.regions import RegionSettings
from feature_extract.sources.item import BadRow, Item
from opt.config import UserError
from opt.data.manifest import MANIFEST, Manifest, read_receipt, shard_name, write_manifest
from opt.files import open_atomic, write_atomic
from opt.lock import alone
from opt.progress import progress

SETTINGS = "settings.json"
FAILURES = "failures.jsonl"
LONGEST = 65_535
"""What the index of a shard can count of regions or frames."""


@dataclass(frozen=True)
class ExtractConfig:
    """What to extract, with which networks, and where to."""

    source: Positional[str]
    """Layout of the corpus: a module of feature_extract/sources, such as localized_narratives."""
    folder: Positional[Path]
    """Where the corpus lies."""
    out: Path
    """Folder of the shards; made when absent."""
    split: str = "train"
    """Which split of the corpus."""
    regions: str = "tiny"
    """Detector: tiny, none, or BACKEND:WEIGHTS, e.g. torchvision_detector:fasterrcnn_resnet50_fpn_v2:detector.pt"""
    audio: str = "tiny"
    """Speech network: tiny, none, or BACKEND:WEIGHTS, e.g. transformers_speech:facebook/wav2vec2-base"""
    codes: str = "tiny"
    """Image tokenizer: tiny, none, or BACKEND:WEIGHTS, e.g. dvae:codes.safetensors"""
    max_regions: int = 36
    """At most so many regions a picture."""
    score_threshold: float = 0.2
    """The detector's least score for a region; where all are below, the best one is kept."""
    frames_per_second: float = 10.0
    """Speech features are averaged in time to this rate."""
    max_frames: int = 256
    """A recording that would have more frames is averaged more coarsely, so that it fits."""
    max_seconds: float = 300.0
    """A longer recording is a recorded failure."""
    jpeg: bool = True
    """Store each picture, its short side at most 256, for patch systems and for looking."""
    shard_size: int = 500
    """Rows of the source in a shard: what one worker does at a time, and what a kill can cost."""
    workers: int = 2
    """Processes that extract; what they write does not depend on their number."""
    device: str = "auto"
    """Where the networks run: cpu, cuda, or auto, which is cuda where there is one."""
    dry_run: bool = False
    """Only say what would be done."""


def extract(config: ExtractConfig) -> None:
    """Turn pictures, captions and recordings into shards of features. Run again after a stop, it goes on.

    Example: opt extract localized_narratives runs/demo/scenes --split train --out runs/demo/shards/train
    """
    _check(config)
    rows = plan_rows(config.source, config.folder, config.split)
    work = plan_work(rows, config.shard_size)
    todo = [item for item in work if read_receipt(config.out, item.name) is None]
    done = len(work) - len(todo)
    if config.dry_run:
        print(f"would extract {len(rows)} rows into {len(work)} shards in {config.out}; {done} are there already")
        return
    device = _device(config.device)
    with alone(config.out):
        extractors = open_extractors(config.regions, config.audio, config.codes, _region_settings(config),
                                     _audio_settings(config), device)
        descriptions = extractors.describe()
        _claim(config, _fingerprint(rows, config.folder), device, descriptions)
        if todo:
            (config.out / MANIFEST).unlink(missing_ok=True)
        setup = Setup(config.out, descriptions, device, config.jpeg)
        finished = len(rows) - sum(len(item.rows) for item in todo)
        with progress(f"extract {config.split}", total=len(rows), done=finished, unit="rows") as bar:
            local_runner.run(todo, setup, extractors, config.workers, bar.advance)
        manifest = _commit(config.out, [item.name for item in work], extractors, descriptions)
    print(_summary(config.out, manifest, done))


def plan_rows(source: str, folder: Path, split: str) -> list[Row]:
    """All rows of the source, in its order; a key that has been seen becomes a BadRow in its place."""
    module = source.replace("-", "_")
    known = [entry.name for entry in pkgutil.iter_modules(sources.__path__)]
    reader: Any = importlib.import_module(f"{sources.__name__}.{module}") if module in known else None
    if not hasattr(reader, "read"):
        raise UserError(f"{source!r}: there is no such source, or it is not one that reads a folder; "
                        "`localized_narratives` is one")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected a corpus in the layout {source!r}")
    keys: set[str] = set()
    rows: list[Row] = []
    for row in reader.read(folder, split):
        if isinstance(row, Item) and row.key in keys:
            row = BadRow(row.key, "another row has this key")
        elif isinstance(row, Item):
            keys.add(row.key)
        rows.append(row)
    if not keys:
        raise UserError(f"{folder}: the split {split!r} holds no usable row ({len(rows)} rows)")
    return rows


def plan_work(rows: Sequence[Row], shard_size: int) -> list[WorkItem]:
    """Consecutive rows as work items, one a shard."""
    starts = range(0, len(rows), shard_size)
    return [WorkItem(shard_name(shard), tuple(rows[start : start + shard_size])) for shard, start in enumerate(starts)]


def _check(config: ExtractConfig) -> None:
    """Raises UserError for a number out of range."""
    for name in ("max_regions", "max_frames", "shard_size", "frames_per_second", "max_seconds", "workers"):
        if not 0 < getattr(config, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0 and finite")
    for name in ("max_regions", "max_frames"):
        if getattr(config, name) > LONGEST:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: a shard holds at most {LONGEST}")
    if not 0 <= config.score_threshold < 1:
        raise UserError(f"--score-threshold {config.score_threshold}: must be at least 0 and below 1")


def _region_settings(config: ExtractConfig) -> RegionSettings:
    return RegionSettings(config.max_regions, config.score_threshold)


def _audio_settings(config: ExtractConfig) -> AudioSettings:
    return AudioSettings(config.frames_per_second, config.max_frames, config.max_seconds)


def _device(name: str) -> str:
    """auto resolved; UserError for cuda where there is none."""
    if name not in ("auto", "cpu") and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {name}: not here; `--device cpu` always works, `opt doctor` says what else does")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _claim(config: ExtractConfig, rows_sha256: str, device: str, extractors: dict[str, Any]) -> None:
    """Note in the folder what its bytes depend on. Raises UserError when it holds shards of other settings."""
    settings: dict[str, Any] = {
        "source": config.source.replace("-", "_"), "split": config.split, "rows_sha256": rows_sha256,
        "shard_size": config.shard_size, "jpeg": config.jpeg, "device": device,
    }
    for kind in ("regions", "audio", "codes"):
        about = extractors.get(kind, {"backend": "none"})
        settings |= {kind: {name: value for name, value in about.items() if name != "settings"}}
        settings |= about.get("settings", {})
    path = config.out / SETTINGS
    if path.exists():
        before = _settings(path)
        for name, value in settings.items():
            if name in before and before[name] != value:
                raise UserError(
                    f"{config.out} was begun with {_words(name, before[name])}, now it is {_words(name, value)}: "
                    "give what it was begun with, or choose another --out"
                )
    elif any(config.out.glob("*.tar")):
        raise UserError(f"{config.out} holds shards without {SETTINGS}, made in another way: choose another --out")
    else:
        write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())


def _settings(path: Path) -> dict[str, Any]:
    """What `_claim` wrote. Raises UserError when it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): choose another --out, or delete this folder") from error


def _words(name: str, value: Any) -> str:
    """A setting as the user knows it."""
    if name == "rows_sha256":
        return f"a source whose list of rows has the SHA-256 {value[:12]}"
    if isinstance(value, dict):
        value = ":".join(filter(None, (value["backend"], value.get("weights")))) + (
            f" (SHA-256 {value['weights_sha256'][:12]})" if "weights_sha256" in value else "")
    return f"--{name.replace('_', '-')} {value}"


def _fingerprint(rows: Sequence[Row], folder: Path) -> str:
    """SHA-256 over everything the source says, with paths as seen from its folder."""
    digest = hashlib.sha256()
    for row in rows:
        if isinstance(row, BadRow):
            said: list[Any] = [row.key, row.reason]
        else:
            tellings = [(telling.narration_id, telling.caption, telling.recording) for telling in row.narrations]
            said = [row.key, row.pictures, tellings]
        digest.update(json.dumps(said, default=lambda path: str(path.relative_to(folder))).encode() + b"\n")
    return digest.hexdigest()


def _commit(out: Path, names: list[str], extractors: Extractors, descriptions: dict[str, Any]) -> Manifest:
    """failures.jsonl from the receipts, then the manifest. Raises UserError when nothing could be used."""
    receipts = [receipt for name in names if (receipt := read_receipt(out, name)) is not None]
    with open_atomic(out / FAILURES, "w") as file:
        for failure in (failure for receipt in receipts for failure in receipt.failures):
            part, _, reason = failure.reason.partition(": ")
            line = {"key": failure.key, "part": part, "reason": reason}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if not any(receipt.records for receipt in receipts):
        raise UserError(f"{out}: not one row could be used; {out / FAILURES} says why for each")
    classes = extractors.regions.classes if extractors.regions is not None else ()
    codebook = extractors.codes.codebook if extractors.codes is not None else 0
    return write_manifest(out, names, descriptions, classes, codebook)


def _summary(out: Path, manifest: Manifest, already: int) -> str:
    """Counts, networks, bytes a sample, failures by reason."""
    size = sum(receipt.bytes for receipt in manifest.shards)
    networks = ", ".join(f"{kind} {about['weights']}" for kind, about in manifest.extractors.items())
    lines = [
        f"{out}: {manifest.records} records, {manifest.samples} samples in {len(manifest.shards)} shards "
        f"({already} were there already), {size / max(1, manifest.samples):,.0f} bytes a sample",
        f"networks: {networks or 'none'}",
    ]
    reasons: Counter[str] = Counter()
    for failure in manifest.failures:
        part, _, reason = failure.reason.partition(": ")
        reasons[f"{part.split()[0]}: {reason.partition(' (')[0]}"] += 1
    if reasons:
        lines.append(f"failures: {reasons.total()}, listed in {out / FAILURES}")
        lines += [f"  {count:>6}  {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)
