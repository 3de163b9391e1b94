"""Localized Narratives as published: JSON lines of narrations, beside pictures and recordings.

    <split>_localized_narratives.jsonl, or ..._localized_narratives-00000-of-00010.jsonl
        {"dataset_id", "image_id", "annotator_id", "caption", "timed_caption", "traces", "voice_recording"} a line
    <folder of the layout>/<image_id>.jpg
    voice/<voice_recording>

Pont-Tuset et al., arXiv 1912.03098. Words' times and mouse traces, most of a line's bytes, are skipped unread.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import (
    MALFORMED,
    bad_row,
    decode,
    field,
    join,
    key_of,
    numbered_lines,
    plain_name,
    well_formed,
)
from opt.config import UserError

PATTERN = "_localized_narratives*.jsonl"
FOLDERS = {
    "open_images": {"train": "train", "validation": "validation", "test": "test"},
    "coco": {"train": "train2017", "val": "val2017"},
    "flickr30k": {"train": "flickr30k-images", "val": "flickr30k-images", "test": "flickr30k-images"},
    "ade20k": {"train": "images/training", "validation": "images/validation"},
}
"""Where each corpus, as its own makers publish it, keeps the pictures of a split."""
COCO_DIGITS = 12
"""COCO's pictures have their number as a name, filled up with zeros; Localized Narratives lists the bare number."""
RENAMED = ("flickr30k", "ade20k")
"""Corpora whose recordings are not called what the lines say; see `_published_name`."""


@dataclass(frozen=True)
class Source:
    """Localized Narratives over Open Images, COCO, Flickr30k, ADE20k, or over pictures of your own.

    The folder holds SPLIT_localized_narratives*.jsonl, the pictures and voice/.
    """

    corpus: Positional[Path]
    """Folder of the corpus."""
    split: str = "train"
    """What the files' names begin with: train, or as published: open_images_train_v6, coco_val, ade20k_validation."""
    layout: Literal["auto", "open_images", "coco", "flickr30k", "ade20k", "plain"] = "auto"
    """Where pictures lie: open_images train/ID.jpg, coco train2017/000000ID.jpg, flickr30k flickr30k-images/ID.jpg,
    ade20k images/training/ID.jpg, plain images/ID.jpg. auto: what the split's name begins with, else plain."""
    pictures: str = ""
    """Subfolder that this layout begins in, or a URL; by default the corpus itself."""
    recordings: str = "voice"
    """Subfolder of the recordings, or a URL that their names are added to."""

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        plain_name(self.split)
        files = sorted(self.corpus.glob(f"{glob.escape(self.split)}{PATTERN}"))
        if not files:
            there = sorted({path.name.split("_localized_narratives")[0] for path in self.corpus.glob(f"*{PATTERN}")})
            hint = f"it has the splits {', '.join(there)}" if there else "it holds no file of that layout"
            raise UserError(f"{self.corpus}: no {self.split}{PATTERN}, so there is no split {self.split!r}; {hint}")
        return files

    def rows(self) -> Iterator[Item | BadRow]:
        files, layout = self.files(), self._layout()
        folder = join(self.pictures, self._folder(layout)) + "/"
        digits = COCO_DIGITS if layout == "coco" else 0
        recordings, renamed = self.recordings.rstrip("/") + "/", layout in RENAMED
        row: Item | BadRow
        for path in files:
            for number, line in numbered_lines(path):
                try:
                    image_id, narration = _parse(line, recordings, renamed)
                    row = Item(key_of(image_id), (f"{folder}{image_id.zfill(digits)}.jpg",), (narration,))
                except MALFORMED as error:
                    row = bad_row(f"{path.name}:{number}", error)
                yield row

    def _layout(self) -> str:
        if self.layout != "auto":
            return self.layout
        return next((layout for layout in FOLDERS if self.split.startswith(f"{layout}_")), "plain")

    def _folder(self, layout: str) -> str:
        """The folder of the split's pictures. Raises UserError for a split that the layout does not have."""
        if layout == "plain":
            return "images"
        part = self.split.removeprefix(f"{layout}_").split("_")[0]
        if part not in FOLDERS[layout]:
            raise UserError(f"--split {self.split}: {layout} has {', '.join(FOLDERS[layout])}; for pictures in "
                            "images/, whatever the split is called, say --layout plain")
        return FOLDERS[layout][part]


def _parse(line: bytes, recordings: str, renamed: bool) -> tuple[str, NarrationItem]:
    """One line's image_id and narration. Raises one of MALFORMED."""
    entry = _entry(line)
    image_id, caption = field(entry, "image_id", str), field(entry, "caption", str)
    annotator, recording = well_formed(str(entry.get("annotator_id", ""))), None
    if entry.get("voice_recording"):
        recording = field(entry, "voice_recording", str)
        recording = recordings + (_published_name(recording, annotator) if renamed else recording)
    return image_id, NarrationItem(annotator, caption, recording)


def _entry(line: bytes) -> Any:
    """The line's object, without its words' times and traces where they lie in the published place.

    That is between "caption" and "voice_recording". Where another picture is named in between, a kill has torn two
    lines, and the whole is read and found malformed.
    """
    begin = line.find(b'"timed_caption"')
    end = line.find(b'"voice_recording"', begin)
    if 0 <= begin < end and line.find(b'"image_id"', begin, end) < 0 and b'"caption"' in line[:begin]:
        try:
            return json.loads(decode(line[:begin] + line[end:]))
        except ValueError:
            pass  # not the published form after all; the whole line says what it is
    return json.loads(decode(line))


def _published_name(recording: str, annotator: str) -> str:
    """What a recording of Flickr30k or ADE20k is really called: SPLIT/SPLIT_<number, 16 digits>_<annotator>.ogg.

    The published loader (github google/localized-narratives, `voice_recording_url`) mends the names likewise.
    """
    match = re.fullmatch(r"([^/]+)/.*?(\d+)_\d+\.ogg", recording)
    return f"{match[1]}/{match[1]}_{match[2]:0>16}_{annotator}.ogg" if match else recording
