"""`opt search`: what an index holds that is nearest to one's own words, picture or recording.

    --text --image --audio --own_files--> Sample --system.embed--> unit vector --Index.search--> the first entries
                                                    --rerank: system.fuse with each of them, from the shards--> order

A query of several parts is one vector, the mean of theirs. The index says which model made it, and no other answers.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from eval.lookup.index import WHAT, Index, Modality
from eval.lookup.page import Found, page
from eval.own_files import Input, check_outputs, open_extractors, pair, read_samples, refuse_unusable, write_lines
from eval.reads import reads
from eval.task import in_batches
from opt.checkpoint import from_pretrained
from opt.config import UserError, read_json
from opt.data.record import Sample
from opt.data.shards import ShardReader
from opt.files import make_folder, write_atomic
from opt.systems.system import System

BATCH = 64
"""Queries or pairs in one call of the model."""


@dataclass
class SearchConfig:
    """Options of `opt search`."""

    index: Annotated[Path, Positional, arg(metavar="INDEX")]
    """Folder of an index, as `opt index` leaves it."""
    text: tuple[str, ...] = ()
    """Texts, each in quotes, one a query."""
    image: tuple[Path, ...] = ()
    """Pictures, one a query; beside texts or recordings, the first belongs to the first."""
    audio: tuple[Path, ...] = ()
    """Recordings, one a query."""
    sought: Annotated[Modality | None, arg(name="for")] = None
    """What to look for; by default pictures, and for a picture captions, as far as the index holds them."""
    top: int = 10
    """How many to show."""
    rerank: int = 0
    """Order the first so many anew by matching, which reads query and entry together, and similarity; 0 for none."""
    page: Path | None = None
    """Also write an HTML page with the pictures to this file."""
    out: Path | None = None
    """Also write the results as JSON lines to this file, a line a query."""
    model: Path | None = None
    """Where the index's model is now, if it was moved."""
    shards: Path | None = None
    """Where the shards of the index are now, if they were moved; --rerank and --page read them."""


def search(config: SearchConfig) -> None:
    """Look for what is nearest to your own words, picture or recording; several of each are several queries.

    Text with a recording, or a picture, is one query of both. Similarity is the cosine, -1 to 1; equals stand in the
    order of the index. With --rerank, matching is the log-odds that query and entry belong together; models trained for
    both order by log-odds + similarity / temperature, as `opt eval retrieval` does in two stages.

    Examples, pictures by words, captions by a picture, pictures by words and speech, and a page of the first 20:

    opt search runs/demo/index --text "a red circle"

    opt search runs/demo/index --image photo.jpg

    opt search runs/demo/index --text "a red circle" --audio talk.flac --rerank 50

    opt search runs/demo/index --text "a red circle" "two stars" --top 20 --page found.html --out found.jsonl
    """
    inputs, given = _inputs(config)
    index = Index(config.index)
    sought = _sought(config, given, index)
    shards = _open_shards(config, index) if config.rerank or config.page else None
    system = _open_model(config, index)
    keep_jpeg = reads(system).pixels or config.page is not None
    extractors = open_extractors(system, given)
    for path in (config.page, config.out):
        if path is not None:
            make_folder(path.parent)
    samples, failed = read_samples(inputs, extractors, keep_jpeg)
    answers = dict(zip(samples, _answers(config, system, index, list(samples.values()), given, sought), strict=True))
    if shards is not None and config.rerank:
        answers = {number: _rerank(system, shards, samples[number], given, sought, found, config.rerank)
                   for number, found in answers.items()}
    answers = {number: found[: config.top] for number, found in answers.items()}
    for number, found in answers.items():
        print(f"{inputs[number].name}\n{_table(found)}\n")
    if config.page is not None and shards is not None:
        among = f"{index.facts.rows[sought]:,} {WHAT[sought]}"
        write_atomic(config.page, page(inputs, samples, answers, failed, shards, among).encode())
        print(f"page: {config.page}")
    if config.out is not None:
        lines = {number: {"for": sought, "found": [_line(rank, one) for rank, one in enumerate(found, start=1)]}
                 for number, found in answers.items()}
        write_lines(config.out, inputs, lines, failed)
        print(f"lines: {config.out}")
    refuse_unusable(inputs, failed)


def _inputs(config: SearchConfig) -> tuple[list[Input], tuple[str, ...]]:
    """The queries and their modalities. Raises UserError when nothing is asked, or options make no sense."""
    inputs, given = pair(config.text, config.image, config.audio)
    if not given:
        raise UserError("nothing to look for: give --text, --image or --audio")
    for name, value, least in (("top", config.top, 1), ("rerank", config.rerank, 0)):
        if value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    outputs = [path for path in (config.page, config.out) if path is not None]
    check_outputs(outputs, (*config.image, *config.audio))
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UserError(f"--out {config.out} is where the page goes: name two files")
    return inputs, given


def _sought(config: SearchConfig, given: Sequence[str], index: Index) -> str:
    """What is looked for; when nobody says, the first of picture, caption, recording that the query has not.

    Raises UserError where the index holds none of it, or it cannot be matched with the query.
    """
    held = [modality for modality in ("image", "text", "audio") if modality in index.facts.rows]
    sought: str = config.sought or next((modality for modality in held if modality not in given), held[0])
    index.require(sought)
    if config.rerank and sought in given:
        raise UserError(f"--rerank asks whether query and found belong together, but both are {WHAT[sought]}: leave it "
                        "out, or look --for something else")
    return sought


def _open_model(config: SearchConfig, index: Index) -> System:
    """The model that made the index. Raises UserError where it is gone, or another."""
    folder = config.model or Path(index.facts.model)
    if config.model is None and not folder.exists():
        raise UserError(f"the index was made with the model {folder}, which is gone: --model says where it is now")
    system = from_pretrained(folder)
    here = read_json(folder / "config.json")["sha256"]
    if here != index.facts.model_sha256:
        raise UserError(f"{folder} is another model than the index was made with (SHA-256 {here[:12]}, not "
                        f"{index.facts.model_sha256[:12]}): --model says where that one is, or build the index again")
    return system


def _open_shards(config: SearchConfig, index: Index) -> ShardReader:
    """The shards that were indexed. Raises UserError where they are gone, or others."""
    folder = config.shards or Path(index.facts.shards)
    if config.shards is None and not folder.exists():
        raise UserError(f"--rerank and --page read the shards {folder}, which are gone: --shards says where they are "
                        "now, or leave both out")
    reader = ShardReader(folder)
    if reader.fingerprint != index.facts.split_sha256:
        raise UserError(f"{folder} holds other shards than were indexed (fingerprint {reader.fingerprint[:12]}, not "
                        f"{index.facts.split_sha256[:12]}): --shards says where those are, or build the index again")
    return reader


def _answers(
    config: SearchConfig, system: System, index: Index, samples: list[Sample], given: Sequence[str], sought: str
) -> list[list[Found]]:
    """The nearest entries of each query, best first: as many as are shown or ordered anew."""
    if not samples:
        return []
    vectors = in_batches([partial(_same, sample) for sample in samples],
                         lambda some: list(system.embed(some, given).float().cpu().numpy()), BATCH,
                         f"embed {' + '.join(given)}")
    scores_Qk, rows_Qk = index.search(np.stack(vectors), sought, max(config.top, config.rerank))
    return [[Found(index.entry(sought, row), float(score)) for score, row in zip(scores, rows, strict=True)]
            for scores, rows in zip(scores_Qk, rows_Qk, strict=True)]


def _rerank(
    system: System, shards: ShardReader, query: Sample, given: Sequence[str], sought: str, found: list[Found],
    depth: int,
) -> list[Found]:
    """The first `depth` ordered by matching, and similarity as far as the system weighs it, then the others; equals
    keep their order."""
    asked = {modality: system.alone([query], modality) for modality in given}

    def match(some: list[Sample]) -> list[float]:
        rows = {**dict.fromkeys(given, np.zeros(len(some), np.int64)), sought: np.arange(len(some))}
        return system.fuse({**asked, sought: system.alone(some, sought)}, rows).float().cpu().tolist()

    first = found[:depth]
    jpeg = reads(system).pixels
    scores = in_batches([partial(shards.sample, one.entry.sample, jpeg) for one in first], match, BATCH, "match")
    matched = [one._replace(matching=score) for one, score in zip(first, scores, strict=True)]
    weight = system.cosine_weight
    return sorted(matched, key=lambda one: -((one.matching or 0.0) + weight * one.similarity)) + found[depth:]


def _same(sample: Sample) -> Sample:
    return sample


def _table(found: Sequence[Found]) -> str:
    """A line an entry: rank, similarity, matching where there is one, key, caption; cut to fit a terminal."""
    matched = any(one.matching is not None for one in found)
    wide = max([3, *(len(one.entry.key) for one in found)])
    lines = [f"rank  similarity  {'matching  ' * matched}{'key':{wide}}  caption"]
    for rank, one in enumerate(found, start=1):
        score = "" if one.matching is None else f"{one.matching:+.2f}"
        caption = _plain(one.entry.caption or "")
        matching = f"{score:>8}  " * matched
        lines.append(f"{rank:4}  {one.similarity:10.4f}  {matching}{_plain(one.entry.key):{wide}}  {caption}")
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return "\n".join(line if columns is None or len(line) <= columns else f"{line[: columns - 1]}…" for line in lines)


def _plain(text: str) -> str:
    """One line without what a terminal would obey: colours, other directions of writing."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))


def _line(rank: int, found: Found) -> dict[str, Any]:
    """An entry for --out."""
    entry = {name: value for name, value in found.entry._asdict().items() if value is not None}
    score = {} if found.matching is None else {"matching": round(found.matching, 4)}
    return {"rank": rank, "similarity": round(found.similarity, 5), **score, **entry}
