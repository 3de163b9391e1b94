"""Record <-> bytes: one safetensors file with the features, and the encoded pictures beside it as tar members.

    tensors     picture.0.regions, .boxes, .classes, .scores, ...; narration.0.speech, .codes: the fields of a Record
    int8        features lie as I8 beside their scales, a F32 a row: picture.0.regions and picture.0.regions.scale
    metadata    one entry, "record": JSON of everything that is no array. One entry, because the format fixes no order
    pictures    KEY.jpg for picture 0, KEY.1.jpg for picture 1: WebDataset splits a name at its first dot

The span of the jpegs runs from the first one's first byte to the last one's last, tar headers in between included; the
metadata says where in the span each lies, so that all of them come by one read.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from opt.data.record import Narration, Picture, Record

REGION_ARRAYS = (
    "regions", "boxes", "classes", "scores", "top_classes", "top_scores", "attributes", "attribute_scores",
)  # fmt: skip
PICTURE_ARRAYS = (*REGION_ARRAYS, "codes")
NARRATION_ARRAYS = ("speech", "codes")
FEATURES = ("regions", "speech")
"""The arrays that int8 storage makes smaller."""
DTYPES = {name: np.dtype(kind) for name, kind in {"F16": "<f2", "F32": "<f4", "I16": "<i2", "I8": "i1"}.items()}
LARGEST = 127
SERIAL = 32_767
"""Entries that torch still converts without its threads, which a forked process that inherits them would wait for."""
FIRST_READ = 8192
"""Bytes read at once to get a record's header; most headers fit."""


def encode(record: Record, int8: bool = False) -> bytes:
    """The record without its encoded pictures, as the bytes of a safetensors file; features as int8 if asked for."""
    from safetensors.numpy import save

    arrays = {}
    for name, array in named_arrays(record).items():
        if int8 and name.endswith(FEATURES):
            array, arrays[f"{name}.scale"] = quantise(array)
        arrays[name] = np.ascontiguousarray(array)
    return save(arrays, {"record": json.dumps(_metadata(record), ensure_ascii=False, allow_nan=False)})


def encode_pictures(record: Record) -> bytes:
    """The span of jpegs: the pictures as tar members, less the first one's header and the last one's padding."""
    span = b""
    for number, picture in enumerate(record.pictures):
        if picture.jpeg is not None:
            header = member_header(_jpeg_name(record.key, number), len(picture.jpeg)) if span else b""
            span += block_padding(len(span)) + header + picture.jpeg
    return span


def first_jpeg_header(metadata: dict[str, Any]) -> bytes:
    """The tar header that comes before a record's span of jpegs, from its metadata; b"" without jpegs."""
    for number, picture in enumerate(metadata["pictures"]):
        if picture["jpeg"] is not None:
            return member_header(_jpeg_name(metadata["key"], number), picture["jpeg"][1])
    return b""


def named_arrays(record: Record) -> dict[str, np.ndarray]:
    """Every array of the record under the name it is stored by."""
    parts = [(f"picture.{number}", PICTURE_ARRAYS, picture) for number, picture in enumerate(record.pictures)]
    told = [(f"narration.{number}", NARRATION_ARRAYS, one) for number, one in enumerate(record.narrations)]
    found = {f"{part}.{name}": getattr(holder, name) for part, names, holder in (*parts, *told) for name in names}
    return {name: array for name, array in found.items() if array is not None}


def quantise(features_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float16 features as int8 (R, D) and float32 scales (R,), so that a row's largest magnitude becomes 127.

    int8 times scale is off by at most half a scale, and by what float16 rounds. A row of zeros has scale 0.
    """
    features_RD = features_RD.astype(np.float32)
    scale_R = np.abs(features_RD).max(axis=1, initial=0) / np.float32(LARGEST)
    steps_RD = features_RD / np.where(scale_R > 0, scale_R, 1)[:, None]
    return np.rint(steps_RD).astype(np.int8), scale_R


def dequantise(steps_RD: np.ndarray, scale_R: np.ndarray) -> np.ndarray:
    """Float16 features (R, D) from `quantise`'s form. By torch, which converts to float16 several times as fast."""
    import torch

    steps, scale = torch.from_numpy(steps_RD), torch.from_numpy(scale_R)[:, None]
    features = torch.empty(steps.shape, dtype=torch.float16)
    rows = max(1, SERIAL // max(1, steps.shape[1]))
    for row in range(0, len(steps), rows):
        features[row : row + rows] = steps[row : row + rows] * scale[row : row + rows]
    return features.numpy()


def extended(content: bytes | bytearray, more: Mapping[str, np.ndarray]) -> bytes:
    """A record's safetensors bytes with further arrays: as `encode` would give them, features stored as they are."""
    from safetensors.numpy import save

    metadata, arrays = _stored(content)
    return save({**arrays, **more}, {"record": json.dumps(metadata, ensure_ascii=False, allow_nan=False)})


def decode(content: bytearray, jpegs: bytearray | None) -> Record:
    """The record from its safetensors bytes and, if given, its span of jpegs.

    Arrays are views of `content`, but for features stored as int8, which become float16.
    """
    metadata, arrays = _stored(content)
    for name in [name for name in arrays if name.endswith(".scale")]:
        features = name.removesuffix(".scale")
        arrays[features] = dequantise(arrays[features], arrays[name])
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
            arrays.get(f"narration.{number}.codes"),
        )
        for number, entry in enumerate(metadata["narrations"])
    ]
    return Record(metadata["key"], tuple(pictures), tuple(narrations))


def _stored(content: bytes | bytearray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A record's metadata and its arrays as they are stored, views of `content`."""
    metadata, tensors = parse_header(content)
    data = 8 + int.from_bytes(content[:8], "little")
    return metadata, {
        name: np.ndarray(entry["shape"], DTYPES[entry["dtype"]], content, data + entry["data_offsets"][0])
        for name, entry in tensors.items()
    }


def read_header(file: int, offset: int) -> dict[str, Any]:
    """The metadata of the record whose safetensors bytes begin at `offset` of an open file; reads no features."""
    begin = os.pread(file, FIRST_READ, offset)
    size = int.from_bytes(begin[:8], "little")
    if size + 8 > len(begin):
        begin = os.pread(file, size + 8, offset)
    return parse_header(begin)[0]


def parse_header(content: bytes | bytearray) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A record's metadata, and of every tensor its dtype, shape and data_offsets, from the begin of its bytes."""
    tensors = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(tensors.pop("__metadata__")["record"]), tensors


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
