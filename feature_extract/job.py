"""`opt extract`: a corpus of pictures, captions and recordings to a folder of shards.

    source --plan--> rows --> work items, one a shard --runner--> shards and receipts --commit--> manifest.json, last

The same command again goes on where it stopped: a shard with a receipt is done. Which rows make a shard is fixed by the
plan, so a row that fails leaves its neighbours where they are.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_extract.commit import commit, summary
from feature_extract.extractors import Extractors, open_extractors
from feature_extract.options import ExtractConfig, check, module_name, resolved_device
from feature_extract.origin import origin_of
from feature_extract.plan import open_plan
from feature_extract.profiles import forecast, weigh
from feature_extract.runners.here import run_here
from feature_extract.runners.local import LocalWorker, weigh_apart
from feature_extract.runners.ray_cluster import RayWorker, cluster
from feature_extract.runners.static import Share, share
from feature_extract.runners.supervise import Limits, Supervisor, Tally, stop_at_once
from feature_extract.work import Setup, WorkItem
from opt.data.claim import check_claim, claim
from opt.data.manifest import MANIFEST, read_receipt, shard_name
from opt.files import open_atomic
from opt.lock import alone, in_turn, together
from opt.progress import Progress, counted, progress

BESIDE = ("questions", "labels")
"""What a source may know of its pictures that stands beside the shards, as JSON lines."""


def extract(config: ExtractConfig) -> None:
    """Turn pictures, captions and recordings into shards of features. Run again after a stop, it goes on.

    Example: opt extract localized_narratives runs/demo/scenes --split train --out runs/demo/shards/train

    `opt extract SOURCE --help` shows the options of a source.
    """
    check(config)
    device = resolved_device(config.device)
    mine = share(os.environ) if config.runner == "static" else Share(0, 1)
    if config.dry_run:
        _tell(config, device)
        return
    with stop_at_once(), together(config.out) if config.runner == "static" else alone(config.out):
        extractors = _open(config, device)
        descriptions = extractors.describe()
        with in_turn(config.out):
            plan = open_plan(config.source, module_name(config.name), config.out,
                             lambda sha256: claim(config.out, _settings(config, sha256, device, descriptions), words))
            _write_beside(config)
        job = Job(config, plan_work(plan.size, config.shard_size), mine)
        setup = Setup(config.out, plan, config.source.root, descriptions, device, config.jpeg, config.int8)
        if job.todo:
            print(_forecast(config, setup, extractors), flush=True)
            (config.out / MANIFEST).unlink(missing_ok=True)
            with progress(f"extract {config.source.split}", job.rows, job.rows_done, "rows") as bar:
                run(config, job, setup, extractors, bar)
        with in_turn(config.out):  # two shares that end together would remove each other's unfinished files
            left = [item.name for item in job.work if read_receipt(config.out, item.name) is None]
            if left:
                print(f"{config.out}: the share of rank {mine.rank} (of {mine.world}) is done; {len(left)} of "
                      f"{counted(len(job.work), 'shard')} are with the others, whose last one writes the manifest")
                return
            origin = origin_of(module_name(config.name), config.source)
            manifest = commit(config.out, [item.name for item in job.work], extractors, descriptions, origin)
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
                self.tally.add(receipt.failures)


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


def _open(config: ExtractConfig, device: str) -> Extractors:
    return open_extractors(config.regions, config.audio, config.codes, config.region, config.speech, device,
                           config.image_codes)


def _settings(config: ExtractConfig, rows_sha256: str, device: str, extractors: dict[str, Any]) -> dict[str, Any]:
    """What the bytes of the shards depend on; of weights their hash, not where they lie."""
    settings: dict[str, Any] = {
        "source": module_name(config.name), "split": config.source.split, "rows_sha256": rows_sha256,
        "shard_size": config.shard_size, "jpeg": config.jpeg, "int8": config.int8, "device": device,
    }
    for kind in ("regions", "audio", "codes"):
        about = extractors.get(kind, {"backend": "none"})
        settings |= {kind: {name: value for name, value in about.items() if name not in ("settings", "weights")}}
        settings |= about.get("settings", {})
    return settings


def words(name: str, value: Any) -> str:
    """A setting as the user knows it."""
    option = f"--{name.replace('_', '-')}"
    if name == "rows_sha256":
        return f"annotations whose rows have the SHA-256 {str(value)[:12]}"
    if value is None:
        return f"no {option}"
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    if isinstance(value, dict):
        weights = f" of SHA-256 {str(value['weights_sha256'])[:12]}" if "weights_sha256" in value else ""
        return f"{option} {value.get('backend')}{weights}"
    return f"{option} {value}"


def _write_beside(config: ExtractConfig) -> None:
    """The questions or labels that the source has for its pictures, beside the shards."""
    for name in BESIDE:
        lines, path = getattr(config.source, name, None), config.out / f"{name}.jsonl"
        if callable(lines) and not path.exists():
            with open_atomic(path, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines())


def _forecast(config: ExtractConfig, setup: Setup, extractors: Extractors) -> str:
    weight = weigh(setup, extractors) if config.workers == 0 else weigh_apart(setup, config.row_seconds)
    return forecast(config.out, setup.plan.size, weight, config.profile)


def _tell(config: ExtractConfig, device: str) -> None:
    """What a job would do; nothing is written but a plan that is thrown away. Raises UserError as the job would."""
    extractors = _open(config, device)
    descriptions = extractors.describe()
    with tempfile.TemporaryDirectory() as folder:
        plan = open_plan(
            config.source, module_name(config.name), Path(folder),
            lambda sha256: check_claim(config.out, _settings(config, sha256, device, descriptions), words))
        work = plan_work(plan.size, config.shard_size)
        done = sum(read_receipt(config.out, item.name) is not None for item in work)
        print(f"would extract {counted(plan.size, 'row')} into {counted(len(work), 'shard')} in {config.out}; {done:,} "
              "are there already")
        setup = Setup(config.out, plan, config.source.root, descriptions, device, config.jpeg, config.int8)
        print(_forecast(config, setup, extractors))
