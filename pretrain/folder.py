"""A run's folder: one job at a time, and what fixes what is learned in it.

    config.json      every setting; fingerprints of data, words, and weights to start with
    tokenizer.json   the run's words

A run whose settings or data differ is refused, once a state is saved; what is not learned from may change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opt import config as configuration
from opt.config import UserError, read_json
from opt.data.shards import ShardReader
from opt.distributed import rank
from opt.files import mend_folder, write_atomic
from opt.lock import alone, remove_unfinished
from opt.systems.system import System
from pretrain.parallel import of_first
from pretrain.start import Start
from pretrain.state import newest_state

FREE = {
    "shards", "validation", "start", "cache", "cache_gigabytes", "out", "dry_run", "profile", "tensorboard",
    "loop.workers", "loop.log_every", "loop.save_every", "loop.keep", "loop.max_skipped", "loop.parallel",
    "loop.compile", "history",
}
"""Settings that may change between the starts of one run: they do not change what is learned. (Whether places hold the
same data, or weights to start with, is told by fingerprints.)"""


@contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """The run's folder for these processes alone, the first of which holds its lock; what a kill left is mended."""
    lock = alone(out)
    of_first(lambda: lock.__enter__())
    try:
        if rank() == 0:
            remove_unfinished(out / "checkpoints")
            for name in ("model", "best"):
                mend_folder(out / name)
        yield
    finally:
        if rank() == 0:
            lock.__exit__(None, None, None)


def identity(
    config: Any, system: System, reader: ShardReader, held_out: ShardReader | None, start: Start | None, more: str
) -> dict[str, Any]:
    """What config.json holds. more: what else than shards fixes what is learned from."""
    told = configuration.to_dict(config)
    if told.get("proportions"):  # they are on any scale
        told["proportions"] = [round(share / sum(told["proportions"]), 9) for share in told["proportions"]]
    data = [reader.fingerprint, *([more] if more else []), *([f"held out {held_out.fingerprint}"] if held_out else [])]
    return {
        **told, "data": ", ".join(data), "start_sha256": start.sha256 if start else None,
        "words": system.tokenizer.fingerprint if system.reads_text else None,
        "history": [configuration.to_dict(stage) for stage in start.history] if start else [],
    }


def keep_identity(out: Path, told: dict[str, Any], system: System) -> None:
    """Write it into the run's folder, unless another run is there. Raises UserError as `require_same_run` does."""
    require_same_run(out, told)
    if system.reads_text:
        system.tokenizer.save(out)
    write_atomic(out / "config.json", json.dumps(told, indent=2).encode())


def require_same_run(out: Path, told: dict[str, Any]) -> None:
    """Raises UserError naming the first difference from the run in `out`, if that one has saved a state."""
    path = out / "config.json"
    if newest_state(out / "checkpoints") is None or not path.exists():
        return
    saved = read_json(path)
    if not isinstance(saved, dict):
        raise UserError(f"{path} is damaged, it holds no settings; give another --out")
    before, now = _flat(saved), _flat(told)
    for key in (key for key in now if key not in FREE and before.get(key) != now[key]):
        differs = {
            "data": "was made with other shards, held-out shards, or another order of them",
            "start_sha256": "began with other weights than --start names now",
            "words": "was made with other words: its tokenizer.json is another one",
        }.get(key, f"is a run with {key} = {before.get(key)!r}, not {now[key]!r}")
        raise UserError(f"{out} {differs}; give the same settings to go on, or another --out (with --start "
                        f"model:{out / 'model'} it begins with what was learned here)")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
