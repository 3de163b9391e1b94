"""Localized Narratives as published: JSONL shards of narrations, a folder of pictures, a folder of recordings.

    <split>_localized_narratives.jsonl, or ..._localized_narratives-00000-of-00010.jsonl
        {"image_id", "annotator_id", "caption", "timed_caption", "traces", "voice_recording"} a line
    images/<image_id>.jpg
    voice/<voice_recording>

Lines of one image_id, wherever they stand, are narrations of one item (Pont-Tuset et al., arXiv 1912.03098).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from feature_extract.sources.item import BadRow, Item, NarrationItem, clean_key
from opt.config import UserError

PATTERN = "_localized_narratives*.jsonl"


class _Line(NamedTuple):
    """What is kept of one line; the traces, most of its bytes, are not."""

    annotator_id: str
    caption: str
    recording: str | None


def read(folder: Path, split: str) -> Iterator[Item | BadRow]:
    """The split's items in order of first appearance; a malformed line is a BadRow in the place where it stands.

    Raises UserError when the folder holds no file of that split.
    """
    narrations: dict[str, list[_Line] | BadRow] = {}
    for path in _files(folder, split):
        with path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                if not content.strip():
                    continue
                try:
                    image_id, line = _parse(content)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    where = f"{path.name}:{number}"
                    narrations[where] = BadRow(where, f"malformed line ({type(error).__name__}: {error})")
                    continue
                lines = narrations.setdefault(image_id, [])
                if isinstance(lines, list):
                    lines.append(line)
    for image_id, lines in narrations.items():
        yield lines if isinstance(lines, BadRow) else _item(folder, image_id, lines)


def _files(folder: Path, split: str) -> list[Path]:
    if "/" in split or "\\" in split:
        raise UserError(f"--split {split}: must be the first part of a file's name, such as train")
    files = sorted(folder.glob(f"{glob.escape(split)}{PATTERN}"))
    if not files:
        there = sorted({path.name.split("_localized_narratives")[0] for path in folder.glob(f"*{PATTERN}")})
        hint = f"it has the splits {', '.join(there)}" if there else "it holds no file of that layout"
        raise UserError(f"{folder}: no {split}{PATTERN}, so there is no split {split!r}; {hint}")
    return files


def _parse(content: bytes) -> tuple[str, _Line]:
    """One line. Raises ValueError, KeyError or TypeError when it is malformed."""
    entry = json.loads(content)
    image_id, caption, recording = entry["image_id"], entry["caption"], entry.get("voice_recording")
    if not isinstance(image_id, str) or not clean_key(image_id):
        raise ValueError(f"image_id {image_id!r} is not a name")
    if not isinstance(caption, str):
        raise ValueError(f"caption {caption!r} is not a text")
    if recording is not None and not isinstance(recording, str):
        raise ValueError(f"voice_recording {recording!r} is not a name")
    annotator_id = str(entry.get("annotator_id", ""))
    for text in (image_id, caption, recording or "", annotator_id):
        text.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair: no file can hold it
    for name in filter(None, (image_id, recording)):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ValueError(f"{name!r} leads out of the folder")
    return image_id, _Line(annotator_id, caption, recording or None)


def _item(folder: Path, image_id: str, lines: list[_Line]) -> Item:
    narrations = [
        NarrationItem(line.annotator_id, line.caption, folder / "voice" / line.recording if line.recording else None)
        for line in lines
    ]
    return Item(clean_key(image_id), (folder / "images" / f"{image_id}.jpg",), tuple(narrations))
