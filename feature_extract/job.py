"""`opt extract`: a corpus of pictures, captions and recordings to a folder of shards.

    source --plan--> rows --> work items, one a shard --runner--> shards and receipts --commit--> manifest.json, last

The same command again goes on where it stopped: a shard with a receipt is done. Which rows make a shard is fixed by the
plan, so a row that fails leaves its neighbours where they are.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
import tyro

from feature_extract import sources
from feature_extract.audio import AudioSettings
from feature_extract.claim import claim
from feature_extract.commit import commit, summary
from feature_extract.extractors import Extractors, open_extractors
from feature_extract.plan import Plan, open_plan
from feature_extract.profiles import LONGEST, PROFILES, forecast, weight
from feature_extract.regions import RegionSettings
from feature_extract.runners.here import run_here
from feature_extract.runners.local import LocalWorker
from feature_extract.runners.ray_cluster import RayWorker, cluster
from feature_extract.runners.static import Share, share
from feature_extract.runners.supervise import Limits, Supervisor, Tally, stop_at_once
from feature_extract.work import Setup, WorkItem
from opt.config import UserError
from opt.data.manifest import MANIFEST, read_receipt, shard_name
from opt.files import open_atomic
from opt.lock import alone, in_turn, together
from opt.progress import Progress, progress

AnySource = TypeVar("AnySource")

QUESTIONS = "questions.jsonl"


@dataclass(frozen=True)
class ExtractConfig(Generic[AnySource]):
    """What to extract, with which networks, and where to."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Which layout the corpus has: localized_narratives, coco_captions, table, folder, ... (docs/sources.md). With
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
        name = next((word for word in argv if _module(word) in names()), "localized_narratives")
        kind = importlib.import_module(f"{sources.__name__}.{_module(name)}").Source
        chosen = [after for word, after in zip(argv, [*argv[1:], ""], strict=True) if word == "--profile"]
        chosen += [word.partition("=")[2] for word in argv if word.startswith("--profile=")]
        stored = PROFILES.get(chosen[-1] if chosen else "standard", PROFILES["standard"])
        missing: Any = tyro.MISSING
        return ExtractConfig[kind], ExtractConfig(  # type: ignore[valid-type]
            name if name in argv else missing, kind(missing, "train"), missing, int8=stored["int8"],
            region=RegionSettings(top_classes=stored["top_classes"]),
            speech=AudioSettings(frames_per_second=stored["frames_per_second"], max_frames=stored["max_frames"]),
        )


def extract(config: ExtractConfig) -> None:
    """Turn pictures, captions and recordings into shards of features. Run again after a stop, it goes on.

    Example: opt extract localized_narratives runs/demo/scenes --split train --out runs/demo/shards/train

    `opt extract SOURCE --help` shows the options of a source.
    """
    _check(config)
    device = _device(config.device)
    mine = share(os.environ) if config.runner == "static" else Share(0, 1)
    if config.dry_run:
        _tell(config, device)
        return
    with stop_at_once(), together(config.out) if config.runner == "static" else alone(config.out):
        extractors = _open(config, device)
        descriptions = extractors.describe()
        with in_turn(config.out):
            plan = open_plan(config.source, _module(config.name), config.out,
                             lambda sha256: claim(config.out, _settings(config, sha256, device, descriptions)))
            _write_questions(config)
        job = Job(config, plan_work(plan.size, config.shard_size), mine)
        setup = Setup(config.out, plan, config.source.root, descriptions, device, config.jpeg, config.int8)
        if job.todo:
            print(_forecast(config, plan, extractors), flush=True)
            (config.out / MANIFEST).unlink(missing_ok=True)
            with progress(f"extract {config.source.split}", job.rows, job.rows_done, "rows") as bar:
                run(config, job, setup, extractors, bar)
        with in_turn(config.out):  # two shares that end together would remove each other's unfinished files
            left = [item.name for item in job.work if read_receipt(config.out, item.name) is None]
            if left:
                print(f"{config.out}: share {mine.rank} of {mine.world} is done; {len(left)} of {len(job.work)} shards "
                      "are with the other shares, whose last one writes the manifest")
                return
            manifest = commit(config.out, [item.name for item in job.work], extractors, descriptions)
    print(summary(config.out, manifest, job.done))


class Job:
    """The work items of one share: which there are, which are done, which are to do."""

    def __init__(self, config: ExtractConfig, work: Sequence[WorkItem], mine: Share) -> None:
        self.work = work
        self.tally = Tally()
        self.todo: list[WorkItem] = []
        self.rows, self.rows_done, self.done = 0, 0, 0
        for item in work[mine.rank :: mine.world]:
            receipt = read_receipt(config.out, item.name)
            again = receipt is not None and config.retry_failed and bool(receipt.failures)
            self.rows += item.stop - item.start
            if receipt is None or again:
                self.todo.append(dataclasses.replace(item, retry=again))
            else:
                self.rows_done += item.stop - item.start
                self.done += 1
                self.tally.add([failure.reason for failure in receipt.failures])


def plan_work(rows: int, shard_size: int) -> list[WorkItem]:
    """Consecutive rows as work items, one a shard."""
    starts = range(0, rows, shard_size)
    return [WorkItem(shard_name(shard), start, min(start + shard_size, rows)) for shard, start in enumerate(starts)]


def run(config: ExtractConfig, job: Job, setup: Setup, extractors: Extractors, bar: Progress) -> None:
    """Do the job's work items by its runner. Raises RunAgain when asked to stop before the end."""
    limits = Limits(config.row_seconds, config.max_failures)
    job.tally.check(limits)
    if config.workers == 0:
        run_here(job.todo, setup, extractors, limits, job.tally, bar)
    elif config.runner == "ray":
        with cluster(config.workers):
            Supervisor(lambda number: RayWorker(setup), config.workers, limits, job.tally, bar).run(job.todo)
    else:
        Supervisor(lambda number: LocalWorker(setup, number), config.workers, limits, job.tally, bar).run(job.todo)


def names() -> list[str]:
    """The sources that can be extracted: modules of feature_extract/sources with a Source."""
    modules = {entry.name: importlib.import_module(f"{sources.__name__}.{entry.name}")
               for entry in pkgutil.iter_modules(sources.__path__)}
    return [name for name, module in modules.items() if dataclasses.is_dataclass(getattr(module, "Source", None))]


def _module(name: str) -> str:
    return name.replace("-", "_")


def _check(config: ExtractConfig) -> None:
    """Raises UserError for a source that is not there, a number out of range, or a corpus that cannot be read."""
    if _module(config.name) not in names():
        raise UserError(f"{config.name!r}: there is no such source; there are {', '.join(names())}")
    if type(config.source).__module__ != f"{sources.__name__}.{_module(config.name)}":
        raise UserError(f"another option is called like a source; put the source first: opt extract {config.name} ...")
    for name in ("shard_size", "row_seconds"):
        if not 0 < getattr(config, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0 and finite")
    if config.workers < 0 or (config.workers == 0 and config.runner == "ray"):
        raise UserError(f"--workers {config.workers}: must be at least 0, and at least 1 with --runner ray")
    if config.max_failures is not None and config.max_failures < 0:
        raise UserError(f"--max-failures {config.max_failures}: must be at least 0")
    ranges = {"max_regions": (1, LONGEST), "max_frames": (0, LONGEST), "frames_per_second": (0, 1e6),
              "max_seconds": (0.1, 1e6), "score_threshold": (0, 1), "top_classes": (0, LONGEST)}
    for name, (least, most) in ranges.items():
        value = {**vars(config.region), **vars(config.speech)}[name]
        if not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value}: must lie in {least} to {most:g}")
    if not config.source.corpus.exists():
        raise UserError(f"{config.source.corpus} is not there; expected a corpus in the layout {config.name!r}")
    config.source.files()


def _open(config: ExtractConfig, device: str) -> Extractors:
    return open_extractors(config.regions, config.audio, config.codes, config.region, config.speech, device)


def _device(name: str) -> str:
    """auto resolved; UserError for cuda where there is none."""
    if name not in ("auto", "cpu") and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {name}: not here; `--device cpu` always works, `opt doctor` says what else does")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _settings(config: ExtractConfig, rows_sha256: str, device: str, extractors: dict[str, Any]) -> dict[str, Any]:
    """What the bytes of the shards depend on."""
    settings: dict[str, Any] = {
        "source": _module(config.name), "split": config.source.split, "rows_sha256": rows_sha256,
        "shard_size": config.shard_size, "jpeg": config.jpeg, "int8": config.int8, "device": device,
    }
    for kind in ("regions", "audio", "codes"):
        about = extractors.get(kind, {"backend": "none"})
        settings |= {kind: {name: value for name, value in about.items() if name != "settings"}}
        settings |= about.get("settings", {})
    return settings


def _write_questions(config: ExtractConfig) -> None:
    """The questions that the source has about its pictures, beside the shards."""
    if hasattr(config.source, "questions") and not (config.out / QUESTIONS).exists():
        with open_atomic(config.out / QUESTIONS, "w") as file:
            file.writelines(json.dumps(question) + "\n" for question in config.source.questions())


def _forecast(config: ExtractConfig, plan: Plan, extractors: Extractors) -> str:
    size, measured = weight(plan, config.source.root, extractors, config.jpeg, config.int8)
    return forecast(config.out, plan.size, size, measured, config.profile)


def _tell(config: ExtractConfig, device: str) -> None:
    """What a job would do; nothing is written but a plan that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        plan = open_plan(config.source, _module(config.name), Path(folder), lambda sha256: None)
        work = plan_work(plan.size, config.shard_size)
        done = sum(read_receipt(config.out, item.name) is not None for item in work)
        print(f"would extract {plan.size:,} rows into {len(work):,} shards in {config.out}; {done:,} are there already")
        print(_forecast(config, plan, _open(config, device)))
