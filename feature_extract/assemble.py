"""One item of a source to one record: read its files, run the extractors, note what could not be used.

    Item --read_media--> Media --make_record--> Record, or None when nothing is left of it

Rules: a picture that cannot be used drops the record, an empty caption drops its narration, a recording that cannot be
used leaves the caption; when no narration is left of those an item had, the record goes too. Each loss is a Failure
whose reason reads "PART NUMBER: REASON (DETAILS)".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from feature_extract.extractors import Extractors
from feature_extract.media import LoadedPicture, MediaError, read_picture, read_recording
from feature_extract.sources.item import Item, NarrationItem
from opt.data.manifest import Failure
from opt.data.record import Narration, Picture, Record


@dataclass(frozen=True)
class Media:
    """An item with its files read. waveforms: one a narration, None without a usable recording.

    `failures` grows while the record is made.
    """

    item: Item
    pictures: list[LoadedPicture] = field(default_factory=list)
    waveforms: list[np.ndarray | None] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def fail(self, part: str, reason: str) -> None:
        """Note a loss."""
        self.failures.append(Failure(self.item.key, f"{part}: {reason}"))

    @property
    def size(self) -> int:
        """Bytes of the decoded pictures and sound."""
        pixels = sum(3 * picture.image.width * picture.image.height for picture in self.pictures)
        return pixels + sum(waveform.nbytes for waveform in self.waveforms if waveform is not None)


def read_media(item: Item, root: Path, keep_jpeg: bool, max_seconds: float | None) -> Media:
    """Read an item's files, whose paths begin at `root`; recordings only when `max_seconds` is given.

    Never raises for a file's sake.
    """
    media = Media(item)
    for number, path in enumerate(item.pictures):
        try:
            media.pictures.append(read_picture(_place(root, path), keep_jpeg))
        except MediaError as error:
            media.fail(f"picture {number}", str(error))
    if len(media.pictures) == len(item.pictures):
        for number, narration in enumerate(item.narrations):
            wanted = max_seconds is not None and not _is_empty(narration) and narration.recording is not None
            place = _place(root, narration.recording or "") if wanted else None
            media.waveforms.append(_waveform(media, number, place, max_seconds or 0.0))
    return media


def make_record(media: Media, extractors: Extractors) -> tuple[Record | None, list[Failure]]:
    """The item's record, or None, and everything that was lost of it."""
    item = media.item
    pictures = [_picture(media, number, loaded, extractors) for number, loaded in enumerate(media.pictures)]
    usable = [picture for picture in pictures if picture is not None]
    if len(usable) < len(item.pictures):
        return None, media.failures
    told = [_narration(media, number, narration, extractors) for number, narration in enumerate(item.narrations)]
    narrations = tuple(narration for narration in told if narration is not None)
    if item.narrations and not narrations:
        return None, media.failures
    return Record(item.key, tuple(usable), narrations), media.failures


def _waveform(media: Media, number: int, path: Path | str | None, max_seconds: float) -> np.ndarray | None:
    if path is None:
        return None
    try:
        return read_recording(path, max_seconds)
    except MediaError as error:
        media.fail(f"recording {number}", str(error))
        return None


def _picture(media: Media, number: int, loaded: LoadedPicture, extractors: Extractors) -> Picture | None:
    try:
        regions = None if extractors.regions is None else extractors.regions(loaded.image)
        codes = None if extractors.codes is None else extractors.codes(loaded.image)
    except Exception as error:  # a network may fail in any way on a picture nobody thought of: the job goes on
        media.fail(f"picture {number}", f"extractor failed ({type(error).__name__}: {error})")
        return None
    width, height = loaded.image.size
    if regions is None:
        return Picture(width, height, codes=codes, jpeg=loaded.jpeg)
    found = dict(vars(regions))
    return Picture(width, height, found.pop("features"), **found, codes=codes, jpeg=loaded.jpeg)


def _narration(media: Media, number: int, narration: NarrationItem, extractors: Extractors) -> Narration | None:
    if _is_empty(narration):
        media.fail(f"caption {number}", "empty")
        return None
    waveform, speech = media.waveforms[number], None
    if waveform is not None and extractors.audio is not None:
        try:
            speech = extractors.audio(waveform)
        except Exception as error:  # as for pictures
            media.fail(f"recording {number}", f"extractor failed ({type(error).__name__}: {error})")
    if speech is None:
        return Narration(narration.narration_id, narration.caption) if narration.caption is not None else None
    return Narration(narration.narration_id, narration.caption, speech.features, speech.frame_rate, speech.seconds,
                     codes=speech.codes)


def _is_empty(narration: NarrationItem) -> bool:
    """Whether the source has a caption with nothing in it; None, no caption at all, is no fault."""
    return narration.caption is not None and not narration.caption.strip()


def _place(root: Path, path: str) -> Path | str:
    """Where a picture or a recording lies: a file, or a URL as it is."""
    return path if path.startswith(("http://", "https://")) else root / path
