"""The contract of the data: what is stored (Record), what is drawn (Sample), checked at the border.

    Record  one file in a shard: pictures of one key and every narration of them. Features are stored once however many
            captions share them.
    Sample  a record with one narration chosen: what one row of a batch is made of.

Missing is absent (None, or an empty tuple), never zeros. Shape legend: R regions, T frames, D feature width,
K classes kept of each region, A attributes kept of each region, g rows of image codes, G codebooks of a speech
quantiser.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

CODE_GRID = (8, 8)
"""Rows and columns of stored image codes where nothing else was asked for: those that OPT draws (64 x 64 pixels, 8 x
down; section 4.6)."""

LONGEST_KEY = 200
"""Bytes: file names made from a key, with what is added to them, stay below the usual limit of 255."""


class RecordError(ValueError):
    """A record breaks the contract; the message names the field, the rule and the value."""


@dataclass(frozen=True)
class Picture:
    """One picture as the extractors saw it.

    regions (R, D) float16: detector features after the box head, best score first.
    boxes (R, 4) float32: x1 y1 x2 y2 over picture width and height, in [0, 1].
    classes (R,) int16: the detector's class of each region (hard pseudo-label of MRC, OPT Eq. 5).
    scores (R,) float32: the detector's confidence, in [0, 1].
    top_classes (R, K) int16, top_scores (R, K) float16: the K best classes of each region and their probabilities, best
        first. The first need not be `classes`: several boxes of one region may carry several of its classes.
    attributes (R, A) int16, attribute_scores (R, A) float16: the A best attributes of each region, best first.
    codes (g, g) int16: image codes of the whole picture squeezed into a square, row by row; of all pictures of a folder
        on the same grid.
    jpeg: the resized picture as an encoded file, for patch systems and for looking.
    width, height: pixels of the original picture.
    """

    width: int
    height: int
    regions: np.ndarray | None = None
    boxes: np.ndarray | None = None
    classes: np.ndarray | None = None
    scores: np.ndarray | None = None
    top_classes: np.ndarray | None = None
    top_scores: np.ndarray | None = None
    attributes: np.ndarray | None = None
    attribute_scores: np.ndarray | None = None
    codes: np.ndarray | None = None
    jpeg: bytes | None = None


@dataclass(frozen=True)
class Narration:
    """One telling of the picture: words, sound, or both.

    caption: the words as the source gives them; None when there are none.
    speech (T, D) float16: speech features at `frame_rate` frames a second; None when there is no recording.
    seconds: duration of the recording; 0.0 without one.
    codes (T, G) int16: quantiser ids, a row a frame of `speech`, a column a codebook.
    """

    narration_id: str
    caption: str | None = None
    speech: np.ndarray | None = None
    frame_rate: float = 0.0
    seconds: float = 0.0
    codes: np.ndarray | None = None


@dataclass(frozen=True)
class Record:
    """Everything stored under one key. Keys hold no dots or slashes: WebDataset splits names there."""

    key: str
    pictures: tuple[Picture, ...] = ()
    narrations: tuple[Narration, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A record with one narration chosen (`narration` is its number, -1 when the record has none).

    speech_codes (T, G) int16: the narration's quantiser ids, a row a frame of `speech`.
    answers: right answers where the caption is a question about the picture (VQA); not stored in shards.
    """

    key: str
    pictures: tuple[Picture, ...] = ()
    narration: int = -1
    narration_id: str = ""
    caption: str | None = None
    speech: np.ndarray | None = None
    speech_codes: np.ndarray | None = None
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """Sizes of samples in their stored form, one entry a sample: what a system's `cost` turns into tokens.

    words: whitespace words and punctuation marks of the caption, a lower estimate of its tokens; 0 when absent.
    regions, frames, codes: 0 when absent. jpegs: bytes of the stored pictures, 0 when absent. All int64 (B,).
    """

    words: np.ndarray
    regions: np.ndarray
    frames: np.ndarray
    codes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    jpegs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.words)


def check(record: Record) -> Record:
    """The record itself when it keeps the contract, else RecordError. Called by the writer and by deep verification."""
    if not record.key or set(record.key) & set("./\\") or record.key != record.key.strip():
        raise RecordError(f"key {record.key!r}: must be non-empty and hold no dot, slash or outer space")
    _check_text(f"key {record.key!r}", record.key)
    if len(record.key.encode()) > LONGEST_KEY:
        raise RecordError(f"key {record.key[:40]!r}...: longer than {LONGEST_KEY} bytes, so no file can be named by it")
    if not record.pictures and not record.narrations:
        raise RecordError(f"record {record.key!r}: holds neither a picture nor a narration")
    for number, picture in enumerate(record.pictures):
        _check_picture(f"record {record.key!r}, picture {number}", picture)
    for number, narration in enumerate(record.narrations):
        _check_narration(f"record {record.key!r}, narration {number}", narration)
    return record


def _check_picture(where: str, picture: Picture) -> None:
    if picture.width < 1 or picture.height < 1:
        raise RecordError(f"{where}: size {picture.width} x {picture.height} is not a picture")
    if picture.jpeg is not None and not picture.jpeg:
        raise RecordError(f"{where}, jpeg: no bytes must be absent (None)")
    together = [picture.regions, picture.boxes, picture.classes, picture.scores]
    if any(field is None for field in together) and any(field is not None for field in together):
        raise RecordError(f"{where}: regions, boxes, classes and scores come together or not at all")
    if picture.regions is not None:
        assert picture.boxes is not None and picture.classes is not None and picture.scores is not None
        count = len(picture.regions)
        _check_array(f"{where}, regions", picture.regions, np.float16, (count, None))
        _check_array(f"{where}, boxes", picture.boxes, np.float32, (count, 4))
        _check_array(f"{where}, classes", picture.classes, np.int16, (count,))
        _check_array(f"{where}, scores", picture.scores, np.float32, (count,))
        if count and (picture.boxes.min() < 0 or picture.boxes.max() > 1):
            raise RecordError(f"{where}, boxes: must lie in [0, 1], got {picture.boxes.min()} to {picture.boxes.max()}")
    _check_ranked(where, "top_classes", "top_scores", picture)
    _check_ranked(where, "attributes", "attribute_scores", picture)
    if picture.codes is not None:
        _check_ids(f"{where}, codes", picture.codes, (None, None))
        if picture.codes.shape[0] != picture.codes.shape[1] or not picture.codes.size:
            raise RecordError(f"{where}, codes: must be a square grid, got {picture.codes.shape}")


def _check_ranked(where: str, ids_name: str, scores_name: str, picture: Picture) -> None:
    """Ids with a score each, in columns: of every region, so many of the best."""
    ids, scores = getattr(picture, ids_name), getattr(picture, scores_name)
    if ids is None and scores is None:
        return
    if ids is None or scores is None or picture.regions is None:
        raise RecordError(f"{where}: {ids_name} and {scores_name} come together, and with regions, or not at all")
    _check_ids(f"{where}, {ids_name}", ids, (len(picture.regions), None))
    _check_array(f"{where}, {scores_name}", scores, np.float16, ids.shape)
    if ids.shape[1] == 0:
        raise RecordError(f"{where}: {ids_name} without a column must be absent (None)")
    if scores.size and (scores.min() < 0 or scores.max() > 1):
        raise RecordError(f"{where}, {scores_name}: must lie in [0, 1], got {scores.min()} to {scores.max()}")


def _check_narration(where: str, narration: Narration) -> None:
    if narration.caption is None and narration.speech is None:
        raise RecordError(f"{where}: holds neither caption nor speech")
    if narration.caption is not None and not narration.caption.strip():
        raise RecordError(f"{where}: an empty caption must be absent (None)")
    for text in (narration.narration_id, narration.caption or ""):
        _check_text(where, text)
    if narration.speech is not None:
        _check_array(f"{where}, speech", narration.speech, np.float16, (None, None))
        if len(narration.speech) == 0:
            raise RecordError(f"{where}, speech: no frames must be absent (None)")
        if narration.frame_rate <= 0:
            raise RecordError(f"{where}: speech needs a frame rate, got {narration.frame_rate}")
    if narration.codes is not None:
        if narration.speech is None:
            raise RecordError(f"{where}: codes come with speech, a row a frame, or not at all")
        _check_ids(f"{where}, codes", narration.codes, (len(narration.speech), None))
        if narration.codes.shape[1] == 0:
            raise RecordError(f"{where}: codes without a column must be absent (None)")


def _check_ids(where: str, ids: np.ndarray, shape: tuple[int | None, ...]) -> None:
    _check_array(where, ids, np.int16, shape)
    if ids.size and ids.min() < 0:
        raise RecordError(f"{where}: must not be negative, got {ids.min()}")


def _check_text(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{where}: holds half a surrogate pair, which UTF-8 cannot write") from error


def _check_array(where: str, array: np.ndarray, dtype: type, shape: tuple[int | None, ...]) -> None:
    if array.dtype != dtype:
        raise RecordError(f"{where}: dtype must be {np.dtype(dtype)}, got {array.dtype}")
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        raise RecordError(f"{where}: shape must be {shape} (None: any), got {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RecordError(f"{where}: holds NaN or infinity")
