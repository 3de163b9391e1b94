"""`opt shards export`: shards as other tools read them.

webdataset: tar files of plain members, a sample a record, in the order of the shards. KEY.1.jpg is the picture after
KEY.jpg, KEY.1.speech.npy the speech of the narration after that of KEY.speech.npy.

    KEY.json            key, pictures [{width, height}], narrations [{id, caption, frame_rate, seconds}]
    KEY.jpg             the stored picture
    KEY.regions.npy     and .boxes, .classes, .scores, .top_classes, .top_scores, .attributes, .attribute_scores, .codes
    KEY.speech.npy      and .speech_codes
    dataset.json        beside the tar files, last of all: what the ids stand for, widths, extractors
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Positional

from opt.config import UserError, to_dict
from opt.data.claim import claim
from opt.data.encoding import block_padding, member_header, named_arrays
from opt.data.manifest import shard_name
from opt.data.record import Record
from opt.data.shards import ShardReader
from opt.files import open_atomic, write_atomic
from opt.lock import alone
from opt.progress import in_bytes, progress

DATASET = "dataset.json"
END = bytes(1024)
"""Two empty blocks end a tar."""


@dataclass(frozen=True)
class ExportConfig:
    """What to write, and where."""

    format: Positional[Literal["webdataset"]]
    """What is to read it."""
    folder: Positional[Path]
    """Folder of shards, as written by `opt extract`."""
    out: Path
    """Folder of the tar files; made when absent."""
    records: int = 1000
    """Records in a tar file."""


def export(config: ExportConfig) -> None:
    """Write shards as tar files of JPEG, JSON and NumPy members for WebDataset. Run again after a stop, it goes on.

    Example: opt shards export webdataset runs/demo/shards/train --out runs/demo/webdataset
    """
    if config.records < 1:
        raise UserError(f"--records {config.records}: must be at least 1")
    reader = ShardReader(config.folder)
    firsts = np.flatnonzero(reader.column("narration") <= 0)
    with alone(config.out):
        claim(config.out, {"source": "opt shards export", "folder": reader.fingerprint, "records": config.records})
        starts = range(0, len(firsts), config.records)
        paths = [config.out / f"{shard_name(number)}.tar" for number in range(len(starts))]
        todo = [(path, start) for path, start in zip(paths, starts, strict=True) if not path.exists()]
        done = len(firsts) - sum(len(firsts[start : start + config.records]) for _, start in todo)
        with progress("export", total=len(firsts), done=done, unit="records") as bar:
            for path, start in todo:
                with open_atomic(path) as file:
                    for number in firsts[start : start + config.records].tolist():
                        for name, content in members(reader.record(number, jpeg=True)):
                            file.write(member_header(name, len(content)) + content + block_padding(len(content)))
                        bar.advance()
                    file.write(END)
        facts: dict[str, Any] = {name: value for name, value in to_dict(reader.manifest).items() if name != "shards"}
        write_atomic(config.out / DATASET, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    size = sum(path.stat().st_size for path in paths)
    print(f"{config.out}: {len(firsts):,} records in {len(paths)} tar files, {in_bytes(size)}")


def members(record: Record) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a record's members, features as float16."""
    about = {
        "key": record.key,
        "pictures": [{"width": picture.width, "height": picture.height} for picture in record.pictures],
        "narrations": [
            {"id": told.narration_id, "caption": told.caption, "frame_rate": told.frame_rate, "seconds": told.seconds}
            for told in record.narrations
        ],
    }
    yield f"{record.key}.json", json.dumps(about, ensure_ascii=False).encode()
    for number, picture in enumerate(record.pictures):
        if picture.jpeg is not None:
            yield _name(record.key, number, "jpg"), picture.jpeg
    for name, array in named_arrays(record).items():
        part, place, field = name.split(".")
        if part == "narration" and field == "codes":
            field = "speech_codes"
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        yield _name(record.key, int(place), f"{field}.npy"), file.getvalue()


def _name(key: str, number: int, what: str) -> str:
    return f"{key}.{what}" if number == 0 else f"{key}.{number}.{what}"
