"""What a download has finished: `receipts.jsonl`, a line a file that lies there whole.

    {"file": "images/0000.jpg", "url": ..., "bytes": ..., "sha256": ..., "checked": "md5"}

A file without a line, or of another size than its line says, is fetched again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Receipt:
    """checked: which checksum of the server's the file has; "" where the server gave none."""

    file: str
    url: str
    bytes: int
    sha256: str
    checked: str


class Receipts:
    """The receipts of a folder; a context, in which lines can be added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "receipts.jsonl"
        self.bytes: dict[str, int] = {}
        """The size of each file that has a line."""

    def __enter__(self) -> Receipts:
        self._file = self.path.open("a+b")
        self._file.seek(0)
        whole = 0
        for line in self._file:
            try:
                entry = json.loads(line)
                self.bytes[entry["file"]] = entry["bytes"]
            except (ValueError, KeyError, TypeError):  # a kill in the middle of a line
                break
            whole += len(line)
        self._file.truncate(whole)
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def has(self, name: str) -> bool:
        """Whether the file lies there as its line says."""
        try:
            return name in self.bytes and (self.folder / name).stat().st_size == self.bytes[name]
        except FileNotFoundError:
            return False

    def add(self, receipt: Receipt) -> None:
        """Write a line, of a file that is there."""
        self._file.write(json.dumps(asdict(receipt)).encode() + b"\n")
        self._file.flush()
        self.bytes[receipt.file] = receipt.bytes
