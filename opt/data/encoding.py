"""Record <-> bytes: one safetensors file with the features, and the encoded pictures beside it as tar members.

    tensors     picture.0.regions, .boxes, .classes, .scores, .codes; narration.0.speech
    metadata    one entry, "record": JSON of everything that is no array. One entry, because the format fixes no order
    pictures    KEY.jpg for picture 0, KEY.1.jpg for picture 1: WebDataset splits a name at its first dot

The span of the jpegs runs from the first one's first byte to the last one's last, tar headers in between included; the
metadata says where in the span each lies, so that all of them come by one read.
"""

from __future__ import annotations

import json
import os
import tarfile
from typing import Any

import numpy as np

from opt.data.record import Narration, Picture, Record

PICTURE_ARRAYS = ("regions", "boxes", "classes", "scores", "codes")
DTYPES: dict[str, np.dtype] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "I16": np.dtype("<i2")}
FIRST_READ = 8192
"""Bytes read at once to get a record's header; most headers fit."""


def encode(record: Record) -> bytes:
    """The record without its encoded pictures, as the bytes of a safetensors file."""
    from safetensors.numpy import save

    arrays = {}
    for number, picture in enumerate(record.pictures):
        for name in PICTURE_ARRAYS:
            array = getattr(picture, name)
            if array is not None:
                arrays[f"picture.{number}.{name}"] = np.ascontiguousarray(array)
    for number, narration in enumerate(record.narrations):
        if narration.speech is not None:
            arrays[f"narration.{number}.speech"] = np.ascontiguousarray(narration.speech)
    return save(arrays, {"record": json.dumps(_metadata(record), ensure_ascii=False, allow_nan=False)})


def encode_pictures(record: Record) -> tuple[bytes, int, bytes]:
    """The tar members of the encoded pictures, where among them the span of jpegs begins, and that span."""
    members = b""
    places = list(_jpeg_places(record).values())
    for number, picture in enumerate(record.pictures):
        if picture.jpeg is not None:
            header = member_header(_jpeg_name(record.key, number), len(picture.jpeg))
            members += header + picture.jpeg + block_padding(len(picture.jpeg))
    if not places:
        return b"", 0, b""
    first = next(number for number, picture in enumerate(record.pictures) if picture.jpeg is not None)
    start = len(member_header(_jpeg_name(record.key, first), places[0][1]))
    return members, start, members[start : start + sum(places[-1])]


def decode(content: bytearray, jpegs: bytearray | None) -> Record:
    """The record from its safetensors bytes and, if given, its span of jpegs. Arrays are views of `content`."""
    metadata, arrays = _parse(content)
    pictures = []
    for number, entry in enumerate(metadata["pictures"]):
        fields = {name: arrays.get(f"picture.{number}.{name}") for name in PICTURE_ARRAYS}
        start, size = entry["jpeg"] or (0, 0)
        jpeg = bytes(jpegs[start : start + size]) if jpegs is not None and entry["jpeg"] else None
        pictures.append(Picture(entry["width"], entry["height"], jpeg=jpeg, **fields))
    narrations = [
        Narration(
            entry["id"],
            entry["caption"],
            arrays.get(f"narration.{number}.speech"),
            entry["frame_rate"],
            entry["seconds"],
        )
        for number, entry in enumerate(metadata["narrations"])
    ]
    return Record(metadata["key"], tuple(pictures), tuple(narrations))


def read_header(file: int, offset: int) -> dict[str, Any]:
    """The metadata of the record whose safetensors bytes begin at `offset` of an open file; reads no features."""
    begin = os.pread(file, FIRST_READ, offset)
    size = int.from_bytes(begin[:8], "little")
    if size + 8 > len(begin):
        begin = os.pread(file, size + 8, offset)
    return json.loads(json.loads(begin[8 : 8 + size])["__metadata__"]["record"])


def member_key(file: int, offset: int) -> str:
    """The key that the tar header before a member's data names, as far as it can be read: for messages about damage."""
    header = os.pread(file, 100, max(0, offset - tarfile.BLOCKSIZE))
    return header.rstrip(b"\0").decode("utf-8", "replace").removesuffix(".safetensors")


def member_header(name: str, size: int) -> bytes:
    """A tar header that depends on nothing but name and size: no time, no owner, mode 644."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def block_padding(size: int) -> bytes:
    """The zeros that fill a member of `size` bytes up to whole tar blocks."""
    return bytes(-size % tarfile.BLOCKSIZE)


def _metadata(record: Record) -> dict[str, Any]:
    places = _jpeg_places(record)
    return {
        "key": record.key,
        "pictures": [
            {"width": int(picture.width), "height": int(picture.height), "jpeg": places.get(number)}
            for number, picture in enumerate(record.pictures)
        ],
        "narrations": [
            {
                "id": narration.narration_id,
                "caption": narration.caption,
                "frame_rate": float(narration.frame_rate),
                "seconds": float(narration.seconds),
            }
            for narration in record.narrations
        ],
    }


def _jpeg_places(record: Record) -> dict[int, tuple[int, int]]:
    """Picture number -> (start in the span of jpegs, size)."""
    places: dict[int, tuple[int, int]] = {}
    end = None
    for number, picture in enumerate(record.pictures):
        if picture.jpeg is not None:
            header = len(member_header(_jpeg_name(record.key, number), len(picture.jpeg)))
            start = 0 if end is None else end + header
            places[number] = (start, len(picture.jpeg))
            end = start + len(picture.jpeg) + len(block_padding(len(picture.jpeg)))
    return places


def _jpeg_name(key: str, number: int) -> str:
    return f"{key}.jpg" if number == 0 else f"{key}.{number}.jpg"


def _parse(content: bytearray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and arrays of a safetensors file, the arrays as views: the library copies each of them twice."""
    data = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:data])
    metadata = json.loads(header.pop("__metadata__")["record"])
    arrays = {
        name: np.ndarray(entry["shape"], DTYPES[entry["dtype"]], content, data + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return metadata, arrays
