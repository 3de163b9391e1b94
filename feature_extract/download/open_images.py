"""`opt download open-images`: Localized Narratives over Open Images, from the public buckets to a folder of the layout
that the source `localized_narratives` reads.

    OUT/<split>_localized_narratives.jsonl   the lines of the first N pictures, as published
    OUT/images/<image_id>.jpg
    OUT/voice/<voice_recording>
    OUT/receipts.jsonl                       address, bytes and SHA-256 of every picture and recording that is there
    OUT/missing.jsonl                        what the last run could not get, with the reason
    OUT/annotations/                         what has been read of the published annotation files

Narrations: Pont-Tuset et al., arXiv 1912.03098, CC BY 4.0. Pictures: Open Images, each under the licence it has there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feature_extract.download.files import STOP_AFTER, Outcome, fetch_all
from feature_extract.download.narratives import NarrativeLine, choose, lines
from feature_extract.download.receipts import Receipts
from feature_extract.download.stream import stream
from feature_extract.fetch import PATIENCE, DamagedError, FetchError, Patience, size
from opt.config import UserError
from opt.files import make_folder, open_atomic, write_atomic
from opt.lock import alone
from opt.progress import in_bytes, progress

ANNOTATIONS = "https://storage.googleapis.com/localized-narratives/annotations"
RECORDINGS = "https://storage.googleapis.com/localized-narratives/voice-recordings"
PICTURES = "https://open-images-dataset.s3.amazonaws.com"
ANNOTATION_FILES = {
    "train": [f"open_images_train_v6_localized_narratives-{number:05}-of-00010.jsonl" for number in range(10)],
    "validation": ["open_images_validation_localized_narratives.jsonl"],
    "test": ["open_images_test_localized_narratives.jsonl"],
}
NARRATIONS = {"train": 507_444, "validation": 41_691, "test": 126_020}
"""As the corpus' page counts them; the pictures are a few fewer."""
SURVEYED = 16
"""Pictures whose files tell how large the others may be."""


@dataclass
class DownloadConfig:
    """How much of the corpus, and where to."""

    out: Path
    """Folder to write; made when absent. Run again with the same folder to go on, or with a larger --n for more."""
    n: int = 1000
    """Pictures: the first so many in the order of the annotation files. 0: all of the split."""
    split: Literal["train", "validation", "test"] = "train"
    """Split of Open Images."""
    annotators: tuple[int, ...] = ()
    """Only narrations of these annotators, by the corpus' numbers. Empty: of all."""
    connections: int = 8
    """Files fetched at the same time."""
    dry_run: bool = False
    """Only say how much would be fetched."""

    def __post_init__(self) -> None:
        if self.n < 0:
            raise UserError(f"--n {self.n}: must be a number of pictures, or 0 for all")
        if not 1 <= self.connections <= 64:
            raise UserError(f"--connections {self.connections}: must be between 1 and 64")


def download(config: DownloadConfig, patience: Patience = PATIENCE) -> None:
    """Fetch Localized Narratives over Open Images: annotations, pictures and recordings. Example:

        python -m opt download open-images --out data/open-images --n 1000 --split train

    Run again after a stop: what is there is not fetched again. A file that cannot be had ends nothing and is listed in
    OUT/missing.jsonl. The folder is a corpus for `opt extract` in the Localized Narratives layout.
    """
    try:
        if config.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                _say_cost(config, Path(folder), {}, patience)
            return
        make_folder(config.out / "annotations")
        with alone(config.out), Receipts(config.out) as receipts:
            try:
                names, malformed = _annotations(config, receipts, patience)
            except DamagedError:  # what had been read was not the server's file, and is gone
                names, malformed = _annotations(config, receipts, patience)
            outcome = fetch_all(names, lambda name: _url(config.split, name), receipts, config.connections, patience)
    except FetchError as error:
        raise UserError(f"the buckets of Open Images: {error}; run the same command again") from error
    for line in malformed:
        outcome.fail(line, "malformed line", lasting=True)
    _report(config, outcome, len(names))


def _url(split: str, name: str) -> str:
    folder, _, rest = name.partition("/")
    return f"{PICTURES}/{split}/{rest}" if folder == "images" else f"{RECORDINGS}/{rest}"


def _published(config: DownloadConfig, folder: Path, patience: Patience) -> Generator[bytes, None, None]:
    """The lines of the split's annotation files, kept in `folder`. Raises FetchError."""
    for name in ANNOTATION_FILES[config.split]:
        with closing(stream(f"{ANNOTATIONS}/{name}", folder / name, patience)) as blocks:
            yield from lines(blocks)


def _annotations(config: DownloadConfig, receipts: Receipts, patience: Patience) -> tuple[list[str], list[str]]:
    """Write the chosen lines. Returns the names of the files that they are about, and where malformed lines are.

    Raises UserError before anything else when there is no room for those files.
    """
    folder = config.out / "annotations"
    _refuse_full_disk(config, _say_cost(config, folder, receipts.bytes, patience), receipts)
    names: dict[str, None] = {}
    malformed: list[str] = []
    with (
        progress("annotations", total=config.n or None, unit="pictures") as bar,
        closing(_published(config, folder, patience)) as published,
        open_atomic(config.out / f"{config.split}_localized_narratives.jsonl") as file,
    ):
        for line in choose(published, config.n, config.annotators, malformed):
            file.write(line.content)
            bar.advance(_picture(line) not in names)
            names.update(dict.fromkeys(filter(None, (_picture(line), _recording(line)))))
    return list(names), malformed


def _picture(line: NarrativeLine) -> str:
    return f"images/{line.image_id}.jpg"


def _recording(line: NarrativeLine) -> str | None:
    return line.recording and f"voice/{line.recording}"


def _say_cost(config: DownloadConfig, folder: Path, known: dict[str, int], patience: Patience) -> int:
    """Print how much the whole of it is, judged by the files of the first pictures. Returns the bytes.

    known: the sizes of files that need not be asked for.
    """
    with closing(_published(config, folder, patience)) as published:
        sample = list(choose(published, min(SURVEYED, config.n or SURVEYED), config.annotators, []))
    seen = {_picture(line) for line in sample}
    spoken = {name for line in sample if (name := _recording(line))}

    def bytes_of(name: str) -> int:
        try:
            return known.get(name) or size(_url(config.split, name), patience) or 0
        except FetchError as error:
            if not error.lasting:
                raise
            return 0  # not there, and so will not be fetched

    with ThreadPoolExecutor(config.connections) as pool:
        sampled = sum(pool.map(bytes_of, seen | spoken))
    sampled += 2 * sum(len(line.content) for line in sample)  # as published and as chosen
    pictures = min(config.n or NARRATIONS[config.split], NARRATIONS[config.split])
    share = pictures / max(1, len(seen))
    print(
        f"Open Images, {config.split}: {pictures:,} pictures and about {round(share * len(spoken)):,} recordings, "
        f"about {in_bytes(share * sampled)} with the annotations (judged by the first {len(seen)} pictures)"
    )
    return int(share * sampled)


def _refuse_full_disk(config: DownloadConfig, whole: int, receipts: Receipts) -> None:
    """Raise UserError when what is still to come has no room."""
    kept = sum(path.stat().st_size for path in (config.out / "annotations").iterdir())
    to_come, free = whole - kept - sum(receipts.bytes.values()), shutil.disk_usage(config.out).free
    if to_come > free:
        raise UserError(
            f"--out {config.out}: about {in_bytes(to_come)} are still to come and {in_bytes(free)} are free; "
            "choose a smaller --n or another folder"
        )


def _report(config: DownloadConfig, outcome: Outcome, wanted: int) -> None:
    """List what did not come. Raises UserError when another run may get more."""
    text = "".join(json.dumps(failure) + "\n" for failure in outcome.failures)
    write_atomic(config.out / "missing.jsonl", text.encode())
    print(f"{config.out}: {outcome.there:,} of {wanted:,} files are there")
    if outcome.failures:
        print(f"{config.out / 'missing.jsonl'} lists what is not: {outcome.summary()}")
    if outcome.passing:
        stopped = "; the server seems to be down" if outcome.in_a_row >= STOP_AFTER else ""
        raise UserError(
            f"{wanted - outcome.there:,} files are missing, most of which another run may get{stopped} "
            f"({outcome.summary()}); run the same command again"
        )
