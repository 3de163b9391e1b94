"""`opt shards units`: speech codes for shards that have none, by k-means of their speech features.

    frames drawn over all narrations --k-means--> centroids (K, D) --every frame's nearest--> codes (T, 1) of new shards

What BEiT-like systems predict where speech is masked (HuBERT, arXiv 2106.07447, section II.A). The centroids lie in
OUT/centroids.safetensors, and give other shards of the same speech network the same units. All else is taken over as it
is stored. Shape legend: n frames drawn, T frames, D feature width, K centroids.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save
from tyro.conf import Positional

from opt.config import UserError, extra
from opt.data.claim import claim
from opt.data.derive import More, Part, Piece, copy_parts
from opt.data.manifest import Manifest
from opt.data.shards import ShardReader
from opt.data.stored import StoredShard
from opt.files import sha256, write_atomic
from opt.lock import alone
from opt.progress import progress

FILE = "centroids.safetensors"
MOST = 2**15
"""Ids are stored as int16."""
IDENTITY = ("weights_sha256", "settings")
"""What tells one speech network, and the layer that is stored of it, from another."""
BATCH = 10_000
"""Frames of a step of k-means."""


@dataclass(frozen=True)
class UnitsConfig:
    """What to give speech codes to, and where to."""

    folder: Positional[Path]
    """Folder of shards with speech features and without speech codes."""
    out: Path
    """Folder of the new shards; made when absent."""
    clusters: int = 100
    """Centroids, so many speech codes there will be."""
    frames: int = 100_000
    """Frames that the centroids are fitted to, drawn evenly from all; held in memory, 4 bytes a number."""
    seed: int = 0
    """Draws the frames and the centroids to begin with."""
    centroids: Path | None = None
    """centroids.safetensors of another folder: the same units here, for test shards."""


def units(config: UnitsConfig) -> None:
    """Give shards speech codes: each frame's nearest of K centroids. Run again after a stop, it goes on.

    Example: opt shards units runs/frozen/train --out runs/units/train --clusters 100

    The same units for the test part: opt shards units runs/frozen/test --out runs/units/test --centroids
    runs/units/train/centroids.safetensors
    """
    _check(config)
    reader = ShardReader(config.folder)
    manifest, path = reader.manifest, config.out / FILE
    _check_speech(config, manifest)
    with alone(config.out):
        claim(config.out, _settings(config, reader))
        if not path.exists():
            write_atomic(path, config.centroids.read_bytes() if config.centroids else _fitted(config, reader))
        centroids_KD = read_centroids(path, manifest, config.folder)
        about = {"backend": "k-means", "weights": str(path.absolute()), "weights_sha256": sha256(path), "settings": {}}
        like = dataclasses.replace(manifest, extractors={**manifest.extractors, "units": about},
                                   speech_codebooks=(len(centroids_KD),))
        parts = [Part(receipt.name, [Piece(reader.folder, receipt)]) for receipt in manifest.shards]
        made = copy_parts(config.out, parts, like, "speech units", _codes_by(centroids_KD))
    print(f"{config.out}: {made.records:,} records, {made.totals['frames']:,} frames in {len(centroids_KD):,} units; "
          f"other shards get the same by --centroids {path}")


def nearest(speech_TD: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """Each frame's nearest centroid by squared distance, the first of equals: int16 (T, 1)."""
    speech_TD = speech_TD.astype(np.float32)
    distance_TK = np.square(centroids_KD).sum(1) - 2 * speech_TD @ centroids_KD.T  # less what all centroids share
    return distance_TK.argmin(1)[:, None].astype(np.int16)


def draw_frames(reader: ShardReader, frames: int, seed: int) -> np.ndarray:
    """Frames (n, D) float32 drawn without replacement from those of all samples, or all where there are fewer.

    Holds the frames drawn and some bytes a sample; a narration is read when a frame of it was drawn.
    """
    ends = np.cumsum(reader.column("frames"), dtype=np.int64)
    total = int(ends[-1])
    drawn = np.arange(total) if total <= frames else np.sort(np.random.default_rng(seed).choice(
        total, frames, replace=False, shuffle=False))
    samples = np.searchsorted(ends, drawn, side="right")
    numbers, firsts = np.unique(samples, return_index=True)
    found_nD = np.empty((len(drawn), reader.manifest.speech_width), np.float32)
    with progress("read frames", total=len(numbers), unit="narrations") as bar:
        for number, first, end in zip(numbers.tolist(), firsts, [*firsts[1:], len(drawn)], strict=True):
            speech = reader.sample(number).speech
            assert speech is not None  # the index says that it has frames
            found_nD[first:end] = speech[drawn[first:end] - (ends[number] - len(speech))]
            bar.advance()
    return found_nD


def fit(frames_nD: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Centroids (K, D) float32 of k-means in small steps, begun by k-means++ five times and the best kept.

    Raises UserError without scikit-learn.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise UserError(f"fitting centroids needs scikit-learn, which is not installed: {extra('units')}; --centroids "
                        "takes those of another folder") from error
    found = MiniBatchKMeans(clusters, batch_size=BATCH, n_init=5, reassignment_ratio=0.0,
                            random_state=seed).fit(frames_nD)
    return np.ascontiguousarray(found.cluster_centers_, np.float32)


def read_centroids(path: Path, manifest: Manifest, folder: Path) -> np.ndarray:
    """Centroids (K, D) float32 of a file that `units` wrote.

    Raises UserError where it is another file, or broken, or made from the features of another speech network than
    `folder` holds.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there; expected {FILE} of a folder that `opt shards units` wrote")
    try:
        with safe_open(path, "np") as file:
            centroids_KD, network = file.get_tensor("centroids"), json.loads(file.metadata()["audio"])
    except Exception as error:  # a file may be broken in any way
        raise UserError(f"{path} holds no centroids as `opt shards units` writes them ({error})") from error
    if centroids_KD.ndim != 2 or centroids_KD.shape[1] != manifest.speech_width:
        raise UserError(f"{path}: centroids of shape {centroids_KD.shape}, the speech of {folder} is "
                        f"{manifest.speech_width} wide; give those made from the same speech network")
    if not 1 <= len(centroids_KD) <= MOST or not np.isfinite(centroids_KD).all():
        raise UserError(f"{path} holds {len(centroids_KD):,} centroids; expected from 1 to {MOST:,}, of finite "
                        "numbers; make them again by `opt shards units`")
    if network != _network(manifest):
        raise UserError(f"{path} was made from features of another speech network, or of another layer or rate, than "
                        f"{folder} holds; give those made from the same")
    return centroids_KD.astype(np.float32)


def _codes_by(centroids_KD: np.ndarray) -> More:
    """What gives the codes of every narration of a record, by the names they are stored under."""
    def codes(shard: StoredShard, place: int) -> dict[str, np.ndarray]:
        record = shard.record(shard.rows(place)[0])
        return {f"narration.{number}.codes": nearest(told.speech, centroids_KD)
                for number, told in enumerate(record.narrations) if told.speech is not None}

    return codes


def _fitted(config: UnitsConfig, reader: ShardReader) -> bytes:
    """The content of a new file of centroids."""
    centroids_KD = fit(draw_frames(reader, config.frames, config.seed), config.clusters, config.seed)
    return save({"centroids": centroids_KD}, {"audio": json.dumps(_network(reader.manifest))})


def _network(manifest: Manifest) -> dict[str, Any]:
    about = manifest.extractors.get("audio", {})
    return {name: about.get(name) for name in IDENTITY}


def _settings(config: UnitsConfig, reader: ShardReader) -> dict[str, Any]:
    """What the new shards depend on."""
    how = ({"clusters": config.clusters, "frames": config.frames, "seed": config.seed} if config.centroids is None
           else {"centroids": sha256(config.centroids)})
    return {"source": "opt shards units", "folder": reader.fingerprint, **how}


def _check_speech(config: UnitsConfig, manifest: Manifest) -> None:
    """Raises UserError for shards without speech, or with codes of it, and for centroids that do not fit them."""
    if not manifest.speech_width:
        raise UserError(f"{config.folder} holds no speech features; extract it with --audio")
    if manifest.speech_codebooks:
        raise UserError(f"{config.folder} has speech codes already, of {list(manifest.speech_codebooks)} entries; give "
                        "a folder that was extracted without --speech-codes")
    if config.centroids is not None:
        read_centroids(config.centroids, manifest, config.folder)
    elif config.clusters > min(config.frames, manifest.totals["frames"]):
        raise UserError(f"--clusters {config.clusters}: {min(config.frames, manifest.totals['frames']):,} frames are "
                        "drawn to fit them to; ask for fewer, or draw more by --frames")


def _check(config: UnitsConfig) -> None:
    """Raises UserError for values out of range, and for what contradicts --centroids."""
    usual = UnitsConfig(config.folder, config.out)
    for name, least, most in (("clusters", 1, MOST), ("frames", 1, 10**8), ("seed", 0, 2**32 - 1)):
        if not least <= getattr(config, name) <= most:
            raise UserError(f"--{name} {getattr(config, name)}: must lie in {least} to {most:,}")
    if config.centroids is not None:
        for name in ("clusters", "frames", "seed"):
            if getattr(config, name) != getattr(usual, name):
                raise UserError(f"--{name}: {config.centroids} fixes it; leave the option out")
    if config.out.resolve() == config.folder.resolve():
        raise UserError(f"--out {config.out} is the folder that is read; choose another")
