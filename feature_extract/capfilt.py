"""CapFilt (BLIP, arXiv 2201.12086, section 3.3): what is told of pictures, put right by two models.

    SHARDS --opt shards caption: a captioner writes one more narration of each picture--> shards
           --opt shards filter: a filter keeps the captions that match their picture----> shards --opt pretrain--> anew

A written caption is a narration whose narration_id marks it; it has no speech, and goes or stays as any other. Shards
stand in the output as in the input, each with a receipt, so a stopped job goes on; records that change nothing are
copied as their stored bytes. How the two verbs make a cycle: docs/capfilt.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from opt.checkpoint import from_pretrained
from opt.config import UserError, to_dict
from opt.data.claim import claim
from opt.data.manifest import MANIFEST, Manifest, Receipt, by_reason, read_receipt, write_manifest
from opt.data.pixels import BadPicture, Sight, picture
from opt.data.record import Narration, Record, Sample
from opt.data.shards import ShardReader, ShardWriter
from opt.data.stored import StoredShard
from opt.files import sha256
from opt.lock import alone
from opt.nn.sampling import Sampling
from opt.nn.states import States
from opt.progress import progress
from opt.systems.system import System

SYNTHETIC = "synthetic"
NO_PICTURE, UNREADABLE, SILENT = (
    "caption: record without a picture", "picture: not readable", "caption: nothing was written",
)  # fmt: skip
WRONG, WRONG_SYNTHETIC, BARE, UNJUDGED = (
    "dropped: caption that does not match", "dropped: synthetic caption that does not match",
    "dropped: record without a caption that matches", "dropped: picture not readable",
)  # fmt: skip
GLANCE = Sight(size=16, patch=16)
"""Pictures are decoded once to see whether they can be."""


@dataclass(frozen=True)
class ShardsCaption:
    """What to describe, and how."""

    folder: Positional[Path]
    """Folder of shards with pictures."""
    model: Path
    """The captioner's folder: any model that writes from pictures."""
    out: Path
    """Folder of the new shards; made when absent."""
    sampling: Sampling = Sampling(top_p=0.9)
    """How captions are written. Drawn ones make better data than searched ones (BLIP, section 4.3)."""
    mark: str = SYNTHETIC
    """narration_id of the written captions."""
    together: int = 32
    """Records described at once."""


@dataclass(frozen=True)
class ShardsFilter:
    """What to judge, by what, how strictly."""

    folder: Positional[Path]
    """Folder of shards with pictures and captions."""
    model: Path
    """The filter's folder: any model that matches text and pictures."""
    out: Path
    """Folder of the new shards; made when absent."""
    threshold: float = 0.5
    """Captions stay whose probability of matching their picture is at least this (the authors': 0.5)."""
    mark: str = SYNTHETIC
    """narration_id of the written captions, which are counted by themselves."""
    together: int = 32
    """Records judged at once."""


@dataclass(frozen=True)
class Retold:
    """What becomes of a record. narrations: those it has from now on; None: the record is left out. notes: what the
    receipt shall say of it."""

    narrations: tuple[Narration, ...] | None
    notes: tuple[str, ...] = ()


def caption_shards(config: ShardsCaption) -> None:
    """Let a model describe every picture, once, beside what is told of it already. Run again after a stop, it goes on.

    Each record draws its own random numbers, whoever shares its batch.

    Example: opt shards caption runs/web --model runs/captioner/model --out runs/captioned
    """
    _check(config)
    if not config.mark.strip():
        raise UserError("--mark is empty; written captions need a narration_id of their own")
    reader, system = ShardReader(config.folder), from_pretrained(config.model)
    if _count(config.folder, reader.manifest, config.mark)[1]:
        raise UserError(f"{config.folder} holds narrations {config.mark!r} already; give another --mark")
    manifest = _retell(config, reader, system, lambda records: describe(system, records, config.sampling, config.mark),
                       "caption", sampling=to_dict(config.sampling))
    told, written = _count(config.out, manifest, config.mark)
    print(f"{config.out}: {written:,} captions written beside {told:,}{_reasons(manifest, reader.manifest)}")


def filter_shards(config: ShardsFilter) -> None:
    """Keep the captions that match their picture. Run again after a stop, it goes on.

    A caption goes together with its speech, and a record with its last caption. What was never told in words, and what
    has no picture, stays.

    Example: opt shards filter runs/captioned --model runs/filter/model --out runs/filtered --threshold 0.5
    """
    _check(config)
    if not 0 <= config.threshold <= 1:
        raise UserError(f"--threshold {config.threshold}: a probability is from 0 to 1")
    reader, system = ShardReader(config.folder), from_pretrained(config.model)
    manifest = _retell(config, reader, system, lambda records: judge(system, records, config.threshold, config.mark),
                       "filter", threshold=config.threshold)
    told, written = _count(config.out, manifest, config.mark)
    print(f"{config.out}: kept {told:,} captions as they were told and {written:,} synthetic ones"
          f"{_reasons(manifest, reader.manifest)}")


def describe(system: System, records: Sequence[Record], sampling: Sampling, mark: str) -> list[Retold]:
    """Each record with one more narration, where it has pictures."""
    shown = [place for place, record in enumerate(records) if record.pictures and _is_readable(record)]
    samples = [Sample(records[place].key, records[place].pictures) for place in shown]
    texts = dict(zip(shown, system.generate_text(samples, ("image",), sampling) if samples else [], strict=True))
    retold = []
    for place, record in enumerate(records):
        text, told = texts.get(place, "").strip(), record.narrations
        if text:
            retold.append(Retold((*told, Narration(mark, text))))
        else:
            retold.append(Retold(told, (SILENT if place in texts else UNREADABLE if record.pictures else NO_PICTURE,)))
    return retold


def judge(system: System, records: Sequence[Record], threshold: float, mark: str) -> list[Retold]:
    """Each record with what matches its pictures."""
    judged = {place for place, record in enumerate(records) if record.pictures and _is_readable(record)}
    pairs = [(place, number) for place in sorted(judged) for number, narration in enumerate(records[place].narrations)
             if narration.caption is not None]
    chances = dict(zip(pairs, match_probabilities(system, records, pairs), strict=True))
    retold = []
    for place, record in enumerate(records):
        if place not in judged:
            retold.append(Retold(None, (UNJUDGED,)) if record.pictures else Retold(record.narrations))
            continue
        wrong = {number for number in range(len(record.narrations)) if chances.get((place, number), 1.0) < threshold}
        notes = [f"{WRONG_SYNTHETIC if record.narrations[number].narration_id == mark else WRONG} (narration "
                 f"{record.narrations[number].narration_id}, probability {chances[place, number]:.3f})"
                 for number in sorted(wrong)]
        kept = tuple(told for number, told in enumerate(record.narrations) if number not in wrong)
        left_out = bool(wrong) and not kept
        retold.append(Retold(None if left_out else kept, (*notes, *([BARE] if left_out else []))))
    return retold


def match_probabilities(system: System, records: Sequence[Record], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """How probably narration number n of record p matches the record's pictures, for each of the pairs (p, n)."""
    if not pairs:
        return []
    shown = sorted({place for place, _ in pairs})
    texts = [Sample(records[place].key, caption=records[place].narrations[number].caption) for place, number in pairs]
    pictures = [Sample(records[place].key, records[place].pictures) for place in shown]
    parts: dict[str, States] = {"text": system.alone(texts, "text"), "image": system.alone(pictures, "image")}
    rows = {"text": np.arange(len(pairs)), "image": np.searchsorted(shown, [place for place, _ in pairs])}
    return [float(chance) for chance in system.match_probability(parts, rows).tolist()]


def _retell(
    config: ShardsCaption | ShardsFilter, reader: ShardReader, system: System,
    change: Callable[[Sequence[Record]], list[Retold]], verb: str, **settings: Any,
) -> Manifest:
    """Make every shard that has no receipt yet, then the manifest."""
    system.require_same(reader.manifest, config.folder)
    settings = {"source": f"opt shards {verb}", "folder": reader.fingerprint, "mark": config.mark,
                "model": sha256(config.model / "model.safetensors"), **settings}  # fmt: skip
    manifest = reader.manifest
    with alone(config.out):
        claim(config.out, settings)
        todo = [receipt for receipt in manifest.shards if read_receipt(config.out, receipt.name) is None]
        if todo:
            (config.out / MANIFEST).unlink(missing_ok=True)
        done = manifest.records - sum(receipt.records for receipt in todo)
        with progress(verb, total=manifest.records, done=done, unit="records") as bar:
            for receipt in todo:
                with StoredShard(config.folder, receipt) as shard, ShardWriter(
                    config.out, receipt.name, manifest.storage == "int8"
                ) as writer:
                    for failure in receipt.failures:
                        writer.fail(failure.key, failure.reason)
                    for first in range(0, receipt.records, config.together):
                        places = range(first, min(first + config.together, receipt.records))
                        _retell_some(shard, writer, places, change)
                        bar.advance(len(places))
        return write_manifest(
            config.out, [receipt.name for receipt in manifest.shards], manifest.extractors, manifest.region_classes,
            manifest.codebook, manifest.region_attributes, manifest.speech_codebooks, manifest.origins, manifest.split,
        )  # fmt: skip


def _retell_some(
    shard: StoredShard, writer: ShardWriter, places: Sequence[int], change: Callable[[Sequence[Record]], list[Retold]]
) -> None:
    """Some records of a shard; one that stays as it is by its stored bytes."""
    records = [shard.record(shard.rows(place)[0], jpeg=True) for place in places]
    for place, record, retold in zip(places, records, change(records), strict=True):
        if retold.narrations is not None:
            if len(retold.narrations) == len(record.narrations):  # one more, some less, or as they were
                writer.copy(shard, place)
            else:
                writer.write(dataclasses.replace(record, narrations=retold.narrations))
        for note in retold.notes:
            writer.fail(record.key, note)


def _check(config: ShardsCaption | ShardsFilter) -> None:
    """Raises UserError for values out of range, and for a folder that is read and written."""
    if config.together < 1:
        raise UserError(f"--together {config.together}: must be at least 1")
    if config.out.resolve() == config.folder.resolve():
        raise UserError(f"--out {config.out} is the folder that is read; choose another")


def _is_readable(record: Record) -> bool:
    """Whether all stored pictures of a record can be decoded."""
    try:
        for shown in record.pictures:
            if shown.jpeg is not None:
                picture(shown.jpeg, GLANCE)
    except BadPicture:
        return False
    return True


def _count(folder: Path, manifest: Manifest, mark: str) -> tuple[int, int]:
    """Captions of a folder: told by people, and written."""
    found = Counter(
        told["id"] == mark for receipt in manifest.shards for told in _told(folder, receipt) if told["caption"]
    )
    return found[False], found[True]


def _told(folder: Path, receipt: Receipt) -> list[dict[str, Any]]:
    """What a shard's records say of their narrations. Reads no features."""
    with StoredShard(folder, receipt) as shard:
        return [told for row in shard.firsts for told in shard.metadata(shard.index[row])["narrations"]]


def _reasons(manifest: Manifest, before: Manifest) -> str:
    """A line for each reason that the verb's receipts give, and those it read do not."""
    counts = by_reason(manifest.failures)
    counts.subtract(by_reason(before.failures))
    return "".join(f"\n  {count:>8,}  {reason.removeprefix('dropped: ')}" for reason, count in counts.items() if count)
