"""`--start`: the weights a run begins with. They are read until the run has a checkpoint of its own, and never again.

    bert:FOLDER --opt/weights/bert.py--> words, and weights for a new system
    run/        config.json names the start and the SHA-256 of its weights; tokenizer.json holds its words
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opt.checkpoint import newest_state
from opt.config import UserError, read_json
from opt.data.tokenizer import Tokenizer
from opt.files import sha256
from opt.systems.opt import OPT
from opt.systems.system import System
from opt.weights import bert


@dataclass(frozen=True)
class Start:
    """What a run begins with. `fill` gives a new system its weights and says which parts now hold them."""

    tokenizer: Tokenizer
    sha256: str
    fill: Callable[[System], str]


def find_start(source: str, vocabulary: Path | None, run: Path) -> Start:
    """What `--start` names; what the run itself keeps of it where the run has begun.

    Raises UserError for a source that cannot be read, or words that are not those of the weights.
    """
    if newest_state(run / "checkpoints") is not None:
        content = read_json(run / "config.json")
        recorded = content.get("start_sha256") if isinstance(content, dict) else None
        if recorded is None:
            raise UserError(f"{run} holds a run that began without --start; give another --out, or leave out --start")
        return Start(Tokenizer.load(run), recorded, lambda system: "its own checkpoint")
    kind, _, place = source.partition(":")
    if kind != "bert" or not place:
        raise UserError(f"--start {source}: expected bert:FOLDER, a folder with config.json, weights and vocab.txt")
    found = bert.describe(Path(place))
    tokenizer = Tokenizer.from_bert(found.folder)
    if vocabulary is not None and Tokenizer.from_vocab(vocabulary).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{vocabulary} holds other words, or another case, than {found.folder}, whose weights "
                        "know only their own; leave out --vocabulary")

    def fill(system: System) -> str:
        if not isinstance(system, OPT):
            raise UserError(f"--start {source}: system {system.name!r} has no place for a BERT; leave out --start")
        return f"{', '.join(bert.begin(system, found))} of {source}"

    return Start(tokenizer, sha256(found.weights), fill)
