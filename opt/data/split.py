"""`opt shards split`: test pictures that are held out for good, chosen by a hash of their keys.

    records with all modalities --sha256("NAME:KEY")--> an order: the first are test, the next val, all others train
    FOLDER --copy--> OUT/test, OUT/val, OUT/train, and OUT/split.json, which makes the same split again anywhere

Neither the order of the shards nor what was extracted together changes who is chosen, and records added later change
little. A key names a picture of one corpus; near copies under other keys are what `opt shards dedup` finds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tyro.conf import Positional

from opt import config as configuration
from opt.config import UserError
from opt.data.claim import claim
from opt.data.derive import Part, Piece, copy_parts
from opt.data.manifest import FrozenPart, shard_name
from opt.data.shards import ShardReader
from opt.data.stored import StoredShard
from opt.files import write_atomic
from opt.lock import alone
from opt.progress import counted, progress

FILE = "split.json"
RULE = ("keys in the order of sha256('NAME:KEY'); the first are test, the next val, among records that have, in one "
        "narration, what `require` lists")  # fmt: skip
HELD_OUT = ("test", "val")
Modality = Literal["text", "image", "audio"]


@dataclass(frozen=True)
class SplitConfig:
    """What to split, and how much of it to hold out."""

    folder: Positional[Path]
    """Folder of shards, as `opt extract` or `opt shards merge` leaves it."""
    out: Path
    """Folder of the split; made when absent. Holds split.json and the folders train, val and test."""
    test: int = 5000
    """Records held out for testing."""
    val: int = 0
    """Records held out for choosing settings."""
    name: str = "split"
    """Name of the split in results, such as openimages-5k. Another name chooses other records."""
    require: tuple[Modality, ...] = ()
    """What a record must have to be held out; left out, all that the folder has: text, image, audio."""
    file: Path | None = None
    """A split.json: the same split again, from another extraction of the same corpus."""
    incomplete: bool = False
    """With --file: go on where some of its keys are missing. What is measured on such a split has another hash."""


@dataclass(frozen=True)
class FrozenSplit:
    """The content of split.json. `keys` and `sha256` have an entry for test, and for val where there is one."""

    name: str
    rule: str
    require: tuple[str, ...]
    counts: dict[str, int]
    sha256: dict[str, str]
    keys: dict[str, list[str]]


def split(config: SplitConfig) -> None:
    """Hold out test records for good, by a hash of their keys. Run again after a stop, it goes on.

    Pictures that look alike may have different keys: clear the training part with `opt shards dedup` afterwards.

    Example: opt shards split runs/open-images --out runs/frozen --test 5000 --name openimages-5k

    Again from other features: opt shards split runs/other --out runs/frozen2 --file runs/frozen/split.json
    """
    _check(config)
    reader = ShardReader(config.folder)
    listed, eligible = _list(reader, _required(config, reader))
    frozen = _chosen(config, reader, eligible) if config.file is None else _given(config, reader, listed)
    there = {key for keys in listed for key in keys}
    held = {part: there.intersection(keys) for part, keys in frozen.keys.items()}
    wanted = {"train": there.difference(*held.values()), **held}
    with alone(config.out):
        claim(config.out, {"source": "opt shards split", "folder": reader.fingerprint, "name": frozen.name,
                           "sha256": frozen.sha256})  # fmt: skip
        write_atomic(config.out / FILE, (json.dumps(configuration.to_dict(frozen), indent=1) + "\n").encode())
        for part, keys in wanted.items():
            if parts := _parts(reader, listed, keys):
                like = dataclasses.replace(reader.manifest, split=FrozenPart(frozen.name, part, keys_sha256(keys)))
                with alone(config.out / part):
                    made = copy_parts(config.out / part, parts, like, f"copy {part}")
                print(f"{config.out / part}: {counted(made.records, 'record')}, {counted(made.samples, 'sample')}")
    told = [f"{part} {len(keys):,} keys, SHA-256 {frozen.sha256[part][:12]}" for part, keys in frozen.keys.items()]
    print(f"{config.out / FILE}: split {frozen.name}; {'; '.join(told)}")


def keys_sha256(keys: Iterable[str]) -> str:
    """SHA-256 over the keys, each once, sorted, one a line: names these pictures in every extraction of a corpus."""
    return hashlib.sha256("".join(f"{key}\n" for key in sorted(set(keys))).encode()).hexdigest()


def read_split(path: Path) -> FrozenSplit:
    """What split.json holds. Raises UserError where its keys are not those that were written, or no split."""
    if not path.is_file():
        raise UserError(f"{path} is not there; expected a {FILE} that `opt shards split` wrote")
    frozen = configuration.from_dict(FrozenSplit, configuration.read_json(path), str(path))
    for part, keys in frozen.keys.items():
        if part not in HELD_OUT or _hash_of_file(keys) != frozen.sha256.get(part) or len(set(keys)) != len(keys):
            raise UserError(f"{path}: the keys of {part!r} are not those that were written, their SHA-256 differs; "
                            "copy the file anew")
    if twice := set(frozen.keys.get("test", ())).intersection(frozen.keys.get("val", ())):
        raise UserError(f"{path}: {min(twice)!r} is both in test and in val; copy the file anew")
    if not _is_name(frozen.name):
        raise UserError(f"{path}: name {frozen.name!r} is no name; copy the file anew")
    if not frozen.keys.get("test"):
        raise UserError(f"{path} names no test keys; expected a {FILE} that `opt shards split` wrote")
    return frozen


def _hash_of_file(keys: Iterable[str]) -> str:
    """`keys_sha256`, or nothing for what no record can be called."""
    try:
        return keys_sha256(keys)
    except UnicodeEncodeError:  # half of a surrogate pair
        return ""


def _is_name(name: str) -> bool:
    return bool(name.strip()) and len(name.splitlines()) == 1


def _check(config: SplitConfig) -> None:
    """Raises UserError for values out of range, and for what contradicts --file."""
    for name, least in (("test", 1), ("val", 0)):
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)} must be at least {least}")
    if not _is_name(config.name):
        raise UserError(f"--name {config.name!r} is no name; give a word such as openimages-5k")
    usual = SplitConfig(config.folder, config.out)
    if config.file is not None:
        for name in ("test", "val", "name", "require"):
            if getattr(config, name) != getattr(usual, name):
                raise UserError(f"--{name}: {config.file} says it already; leave the option out")
    elif config.incomplete:
        raise UserError("--incomplete is for a split that --file names; leave it out")
    if config.out.resolve() == config.folder.resolve():
        raise UserError(f"--out {config.out} is the folder that is read; choose another")


def _required(config: SplitConfig, reader: ShardReader) -> tuple[Modality, ...]:
    """What a held-out record must have. Raises UserError for what the folder lacks altogether."""
    totals = reader.manifest.totals
    there = {"text": totals["words"] > 0, "image": totals["regions"] + totals["codes"] > 0,
             "audio": totals["frames"] > 0}  # fmt: skip
    if lacking := [name for name in config.require if not there[name]]:
        raise UserError(f"--require {lacking[0]}: no record of {config.folder} has it")
    return tuple(name for name in ("text", "image", "audio") if name in (config.require or there) and there[name])


def _list(reader: ShardReader, require: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The keys of every shard by place, and the keys of records one narration of which has all of `require`."""
    listed, eligible = [], []
    with progress("read keys", total=reader.manifest.records, unit="records") as bar:
        for receipt in reader.manifest.shards:
            with StoredShard(reader.folder, receipt) as shard:
                index, keys = shard.index, shard.keys
                has = {"text": index["words"] > 0, "image": index["regions"].astype(int) + index["codes"] > 0,
                       "audio": index["frames"] > 0}  # fmt: skip
                whole = np.all([np.ones(len(index), bool), *(has[name] for name in require)], axis=0)
                good = np.logical_or.reduceat(whole, shard.firsts) if len(keys) else whole
            listed.append(keys)
            eligible += [key for key, kept in zip(keys, good, strict=True) if kept]
            bar.advance(len(keys))
    return listed, eligible


def _chosen(config: SplitConfig, reader: ShardReader, eligible: Sequence[str]) -> FrozenSplit:
    """A new split by the rule. Raises UserError where there are too few records."""
    require = _required(config, reader)
    if config.test + config.val > len(eligible):
        raise UserError(f"--test {config.test} --val {config.val}: {len(eligible):,} of {reader.manifest.records:,} "
                        f"records of {config.folder} have {' and '.join(require)} in one narration; hold out fewer, or "
                        "ask for less by --require")
    order = sorted(set(eligible), key=lambda key: hashlib.sha256(f"{config.name}:{key}".encode()).digest())
    keys = {"test": sorted(order[: config.test])}
    if config.val:
        keys["val"] = sorted(order[config.test : config.test + config.val])
    held = sum(map(len, keys.values()))
    counts = {"train": reader.manifest.records - held, **{part: len(chosen) for part, chosen in keys.items()}}
    hashes = {part: keys_sha256(chosen) for part, chosen in keys.items()}
    return FrozenSplit(config.name, RULE, require, counts, hashes, keys)


def _given(config: SplitConfig, reader: ShardReader, listed: Sequence[Sequence[str]]) -> FrozenSplit:
    """The split of --file. Raises UserError where keys of it are missing here, and that was not allowed."""
    assert config.file is not None
    frozen = read_split(config.file)
    there = {key for keys in listed for key in keys}
    missing = [key for keys in frozen.keys.values() for key in keys if key not in there]
    if there.isdisjoint(frozen.keys["test"]):
        raise UserError(f"{config.folder} has none of the {len(frozen.keys['test']):,} test keys of {config.file}, "
                        f"such as {frozen.keys['test'][0]!r}: it is of another corpus; --name makes a new split of it")
    if missing and not config.incomplete:
        failed = {failure.key for failure in reader.manifest.failures}.intersection(missing)
        raise UserError(f"{config.folder} lacks {len(missing):,} of {sum(map(len, frozen.keys.values())):,} keys of "
                        f"{config.file}, such as {missing[0]!r} ({len(failed):,} of them failed at extraction); mend "
                        "them with `opt extract --retry-failed`, or go on without them by --incomplete")
    return frozen


def _parts(reader: ShardReader, listed: Sequence[Sequence[str]], wanted: set[str]) -> list[Part]:
    """Shards to be, each as full as the fullest that is read, of the records whose keys are wanted, in their order."""
    room = size = max(receipt.records for receipt in reader.manifest.shards)
    shards: list[list[Piece]] = [[]]
    for receipt, keys in zip(reader.manifest.shards, listed, strict=True):
        places = [place for place, key in enumerate(keys) if key in wanted]
        while places:
            if not room:
                room = size
                shards.append([])
            shards[-1].append(Piece(reader.folder, receipt, places=places[:room]))
            places, room = places[room:], room - len(places[:room])
    return [Part(shard_name(number), pieces) for number, pieces in enumerate(shards) if pieces]
