"""`opt index`: a folder of unit vectors to search in, and `Index`, which searches it.

    shards --system.embed, a batch at a time--> INDEX/image.safetensors, text.safetensors, audio.safetensors
                                               --a FAISS factory, if asked for--> INDEX/image.faiss, ...
                                               --> INDEX/index.json, last: without it there is no index

A modality that a killed build had finished is kept, and taken over where the same model embeds the same shards again.
Shape legend: C entries of a modality, Q queries, k found, B samples of a batch, E width of vectors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from tyro.conf import Positional, arg

import opt
from eval.lookup.nearest import approximate, build, empty, exact, open_faiss, save_faiss, share_found
from eval.lookup.vectors import Entry, Vectors, write_vectors
from eval.reads import Reads, open_shards, reads
from eval.task import require_finite
from opt import config as configuration
from opt.checkpoint import from_pretrained
from opt.config import UserError, read_json
from opt.data.record import Sample
from opt.data.shards import ShardReader
from opt.files import sha256, write_atomic
from opt.lock import alone
from opt.progress import progress
from opt.systems.system import MODALITIES, System

SCHEMA = 1
FILE = "index.json"
METRIC = "inner product of unit vectors"
WHAT = {"text": "captions", "image": "pictures", "audio": "recordings"}
Modality = Literal["text", "image", "audio"]


@dataclass
class IndexConfig:
    """Options of `opt index`."""

    model: Annotated[Path, Positional, arg(metavar="MODEL")]
    """Folder of a saved model, such as runs/demo/model."""
    shards: Annotated[Path, Positional, arg(metavar="SHARDS")]
    """Folder of shards whose pictures, captions and recordings are to be found."""
    out: Path
    """Folder for the index."""
    modalities: tuple[Modality, ...] = ()
    """What to embed; by default all that the shards hold."""
    faiss: str | None = None
    """Search by FAISS, which looks at some entries only, from a million on: HNSW32, or "IVF1024,Flat nprobe=32"."""
    batch: int = 64
    """Samples in one call of the model: speed and memory."""


@dataclass(frozen=True)
class IndexFacts:
    """What index.json says: whose vectors these are. `rows` and `bytes` are sizes by modality."""

    model: str
    model_sha256: str
    system: str
    shards: str
    split_sha256: str
    width: int
    rows: dict[str, int]
    bytes: dict[str, int]
    faiss: str | None = None
    faiss_sha256: dict[str, str] = field(default_factory=dict)
    faiss_found: dict[str, float] = field(default_factory=dict)
    """Share of the true first ten that FAISS finds, by modality."""
    metric: str = METRIC
    version: str = opt.__version__
    schema: int = SCHEMA

    def made_from(self, modality: str) -> dict[str, str]:
        """What the vectors of one modality depend on; stands in their file."""
        return {"model_sha256": self.model_sha256, "split_sha256": self.split_sha256, "modality": modality}


class Index:
    """A saved index, opened. Raises UserError where there is none, or it is damaged or of another version.

        index = Index(Path("runs/demo/index"))
        scores_Qk, rows_Qk = index.search(vectors_QE, "image", top=10)
        index.entry("image", rows_Qk[0, 0]).key
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = _read_facts(folder)
        self.vectors: dict[str, Vectors] = {}
        self._faiss: dict[str, Any] = {}
        for modality, size in self.facts.bytes.items():
            path = _vectors_path(folder, modality)
            if not path.exists() or path.stat().st_size != size:
                raise UserError(f"{path} is not as it was written; delete it and build the index again")
            self.vectors[modality] = Vectors(path, self.facts.made_from(modality))

    def search(self, vectors_QE: np.ndarray, modality: str, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Similarities (Q, k) float32 and rows (Q, k) int64 of the nearest entries, best first; k is `top` or all.

        Equal similarities (to 5 digits) stand in the order of the index. By FAISS where the index was built for it.
        """
        self.require(modality)
        candidates = self.vectors[modality].vectors
        if self.facts.faiss is None:
            return exact(vectors_QE, candidates, top)
        if modality not in self._faiss:
            self._faiss[modality] = open_faiss(_faiss_path(self.folder, modality), self.facts.faiss_sha256[modality])
        return approximate(self._faiss[modality], vectors_QE, candidates, top)

    def entry(self, modality: str, row: int) -> Entry:
        """What a row stands for."""
        return self.vectors[modality].entry(int(row))

    def require(self, modality: str) -> None:
        """Raises UserError where the index holds nothing of that modality."""
        if modality not in self.vectors:
            raise UserError(f"{self.folder} holds {' and '.join(WHAT[name] for name in self.vectors)} but no "
                            f"{WHAT[modality]}: look --for what it holds, or build one with them (--modalities)")


def index(config: IndexConfig) -> None:
    """Embed pictures, captions and recordings once, so that `opt search` finds them by words, pictures or speech.

    Every distinct picture, every caption and every recording becomes a vector of unit length, a float32 a number. A
    search compares them all, or by FAISS some of them: how many of the true first ten it finds is measured and said.

    Examples, one that is searched exactly, and one for a million pictures:

    opt index runs/demo/model runs/demo/shards/test --out runs/demo/index

    opt index runs/demo/model runs/demo/shards/test --out runs/demo/index --modalities image --faiss HNSW32
    """
    if config.batch < 1:
        raise UserError(f"--batch {config.batch} must be at least 1")
    _check_folder(config.out)
    system = from_pretrained(config.model)
    reader = open_shards(config.shards, system)
    members = _members(reader, reads(system), config)
    widths = _widths(system, reader, members, config)
    numbers = {modality: some for modality, some in members.items() if modality in widths}
    facts = _begin(config, system, reader, numbers, max(widths.values()))
    if config.faiss is not None:
        empty(facts.width, config.faiss)  # what it refuses, it refuses before the work
    with alone(config.out):
        (config.out / FILE).unlink(missing_ok=True)
        for modality in numbers:
            path = _vectors_path(config.out, modality)
            if not _is_kept(path, facts, modality):
                pieces = _embedded(system, reader, numbers[modality], modality, config.batch)
                write_vectors(path, numbers[modality], facts.width, pieces, facts.made_from(modality))
            facts.bytes[modality] = path.stat().st_size
            print(f"{facts.rows[modality]:,} {WHAT[modality]}")
            if config.faiss is not None:
                _add_faiss(config.out, facts, modality, config.faiss)
        _remove_others(config.out, facts)
        write_atomic(config.out / FILE, (json.dumps(configuration.to_dict(facts), indent=1) + "\n").encode())
    print(f"index: {config.out}")


def _members(reader: ShardReader, reading: Reads, config: IndexConfig) -> dict[str, np.ndarray]:
    """Numbers of the samples to embed, by modality: each caption and recording, and each picture once.

    Raises UserError where the shards lack what is asked for, or the system does not read it.
    """
    present = reading.present(reader.lengths)
    held = {modality: np.flatnonzero(there) for modality, there in present.items() if there.any()}
    for modality in config.modalities:
        if modality not in held:
            reason = reading.unread((modality,)) or f"{config.shards} holds no {WHAT[modality]}"
            raise UserError(f"{reason}: leave {modality} out of --modalities")
    if not held:
        raise UserError(f"{config.shards} holds nothing to index")
    if "image" in held:
        keys = reader.key_hash[held["image"]]
        held["image"] = np.sort(held["image"][np.unique(keys, return_index=True)[1]])
    return {modality: held[modality] for modality in MODALITIES if modality in (config.modalities or held)}


def _widths(
    system: System, reader: ShardReader, members: dict[str, np.ndarray], config: IndexConfig
) -> dict[str, int]:
    """Width of the vectors of each modality, tried on one sample. What the system cannot embed is left out and said.

    Raises UserError where it was asked for, or nothing is left.
    """
    widths: dict[str, int] = {}
    refused: dict[str, UserError] = {}
    for modality, some in members.items():
        try:
            widths[modality] = system.embed([reader.sample(int(some[0]), reads(system).pixels)], [modality]).shape[1]
        except UserError as error:
            refused[modality] = error
    for modality, reason in refused.items():
        if config.modalities or not widths:
            raise reason
        print(f"no {WHAT[modality]}: {reason}")
    return widths


def _begin(
    config: IndexConfig, system: System, reader: ShardReader, numbers: dict[str, np.ndarray], width: int
) -> IndexFacts:
    """What is known before the work."""
    return IndexFacts(
        model=str(config.model.resolve()),
        model_sha256=read_json(config.model / "config.json")["sha256"],
        system=system.name,
        shards=str(config.shards.resolve()),
        split_sha256=reader.fingerprint,
        width=width,
        rows={modality: len(some) for modality, some in numbers.items()},
        bytes={},
        faiss=config.faiss,
    )


def _embedded(
    system: System, reader: ShardReader, numbers: np.ndarray, modality: str, batch: int
) -> Iterator[tuple[np.ndarray, list[Sample]]]:
    """Vectors (B, E) float32 of the samples, a batch at a time, and the samples. Raises UserError for one that is none.
    """
    jpeg = reads(system).pixels
    with torch.inference_mode(), progress(f"embed {WHAT[modality]}", total=len(numbers), unit="samples") as bar:
        for first in range(0, len(numbers), batch):
            samples = [reader.sample(int(number), jpeg) for number in numbers[first : first + batch]]
            vectors_BE = system.embed(samples, [modality]).float().cpu().numpy()
            require_finite(vectors_BE, [sample.key for sample in samples], f"embed {WHAT[modality]}")
            yield vectors_BE, samples
            bar.advance(len(samples))


def _add_faiss(out: Path, facts: IndexFacts, modality: str, factory: str) -> None:
    """Build and save the FAISS structure of a modality, and say how much of the truth it finds."""
    vectors = Vectors(_vectors_path(out, modality), facts.made_from(modality)).vectors
    found = build(vectors, factory)
    path = _faiss_path(out, modality)
    save_faiss(found, path)
    share, judged = share_found(found, vectors)
    facts.faiss_sha256[modality], facts.faiss_found[modality] = sha256(path), share
    print(f"  FAISS {factory} finds {100 * share:.1f} % of the true first ten of {judged} {WHAT[modality]}")


def _remove_others(out: Path, facts: IndexFacts) -> None:
    """Remove what an earlier index of this folder had and this one has not."""
    for modality in MODALITIES:
        if modality not in facts.rows:
            _vectors_path(out, modality).unlink(missing_ok=True)
        if modality not in facts.faiss_sha256:
            _faiss_path(out, modality).unlink(missing_ok=True)


def _is_kept(path: Path, facts: IndexFacts, modality: str) -> bool:
    """Whether an earlier build, whole or killed, left these very vectors."""
    try:
        there = Vectors(path, facts.made_from(modality))
    except UserError:
        return False
    return there.vectors.shape == (facts.rows[modality], facts.width)


def _check_folder(out: Path) -> None:
    """Raises UserError where the folder holds other things than an index."""
    ours = {FILE, *(path(out, modality).name for modality in MODALITIES for path in (_vectors_path, _faiss_path))}
    strange = [path.name for path in out.glob("*") if path.name not in ours and not path.name.startswith(".")]
    if strange:
        raise UserError(f"--out {out} holds {sorted(strange)[0]}, which is no part of an index: name a new folder")


def _read_facts(folder: Path) -> IndexFacts:
    """index.json. Raises UserError that says what is there instead."""
    path = folder / FILE
    if not path.exists():
        begun = any(_vectors_path(folder, modality).exists() for modality in MODALITIES) or (folder / ".lock").exists()
        raise UserError(f"{folder} holds an index that was begun and not finished: run the same `opt index` again"
                        if begun else f"{folder} holds no index; `opt index MODEL SHARDS --out FOLDER` makes one")
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema {schema}, this version reads {SCHEMA}; build the index again")
    facts = configuration.from_dict(IndexFacts, content, str(path))
    if set(facts.bytes) != set(facts.rows) or (facts.faiss is not None and set(facts.faiss_sha256) != set(facts.rows)):
        raise UserError(f"{path} is damaged: its parts name other modalities; build the index again")
    return facts


def _vectors_path(folder: Path, modality: str) -> Path:
    return folder / f"{modality}.safetensors"


def _faiss_path(folder: Path, modality: str) -> Path:
    return folder / f"{modality}.faiss"
