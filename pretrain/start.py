"""`--start`: the weights a run begins with. They are read until the run has a checkpoint of its own, and never again.

    bert:FOLDER  --opt/weights/bert.py--> words, and weights for the text tower of a new system
    vit:PLACE    --opt/weights/vit.py--> weights for the picture tower; may stand beside a BERT. A BEiT, or a ViT, for
                 --opt/weights/beit.py--> what a VLMo sees with
    model:FOLDER --opt/checkpoint.py--> the words and weights of a model of the same system
    run/         config.json names the start, the SHA-256 of its weights and their history; tokenizer.json its words
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opt.checkpoint import from_pretrained, parse_history, read_history
from opt.config import UserError, read_json
from opt.data.tokenizer import Tokenizer
from opt.history import History
from opt.systems.shared.multiway import MultiwaySystem
from opt.systems.system import System
from opt.weights import beit, bert, vit
from opt.weights.source import Source
from pretrain.state import newest_state

TOGETHER = (["model"], ["bert"], ["vit"], ["bert", "vit"])
"""Kinds of weights that a run may begin with."""


@dataclass(frozen=True)
class Start:
    """What a run begins with. `fill` gives a new system its weights and says which parts now hold them."""

    tokenizer: Tokenizer | None
    sha256: str
    fill: Callable[[System], str]
    history: History = ()
    """What the weights were trained on, where they say so."""


def find_start(sources: Sequence[str], vocabulary: Path | None, run: Path) -> Start:
    """What `--start` names, one source or two; what the run itself keeps of it where the run has begun.

    Raises UserError for a source that cannot be read, or words that are not those of the weights.
    """
    readers = {"bert": _from_bert, "vit": _from_vit, "model": _from_model}
    named = [(source, *source.partition(":")[::2]) for source in sources]
    if sorted(kind for _, kind, _ in named) not in TOGETHER or not all(place for *_, place in named):
        raise UserError(f"--start {' '.join(sources)}: expected model:FOLDER, the folder of a saved model; or "
                        "bert:FOLDER, a folder with config.json, weights and vocab.txt; or vit:PLACE, a vision "
                        "transformer's folder or file; or the last two together")
    if newest_state(run / "checkpoints") is not None:
        content = read_json(run / "config.json")
        recorded = content.get("start_sha256") if isinstance(content, dict) else None
        if recorded is None:
            raise UserError(f"{run} holds a run that began without --start; give another --out, or leave out --start")
        earlier = parse_history(content.get("history", []), f"{run / 'config.json'}, history")
        return Start(None, recorded, _nothing, earlier)
    return _together([readers[kind](part, Path(place), vocabulary) for part, kind, place in named])


def _together(starts: list[Start]) -> Start:
    """Several that begin different towers of one system."""
    if len(starts) == 1:
        return starts[0]
    tokenizer = next((start.tokenizer for start in starts if start.tokenizer is not None), None)
    digest = hashlib.sha256("".join(start.sha256 for start in starts).encode()).hexdigest()
    return Start(tokenizer, digest, lambda system: "; ".join(start.fill(system) for start in starts))


def _nothing(system: System) -> str:
    return "its own checkpoint"


def _from_model(source: str, folder: Path, vocabulary: Path | None) -> Start:
    """Another run's model: every weight that both have; heads that it lacks stay new."""
    model = from_pretrained(folder)
    words = model.tokenizer if model.reads_text else None
    _require_same_words(words, vocabulary, folder)
    weights = read_json(folder / "config.json")["sha256"]
    return Start(words, weights, partial(_fill_from_model, source, model), read_history(folder))


def _fill_from_model(source: str, model: System, system: System) -> str:
    if model.name != system.name:
        raise UserError(f"--start {source}: it is a model of system {model.name!r}, and this is {system.name!r}")
    given, own = model.state_dict(), system.state_dict()
    if other := [name for name in own if name in given and given[name].shape != own[name].shape]:
        sizes = f"{tuple(given[other[0]].shape)}, not {tuple(own[other[0]].shape)}"
        raise UserError(f"--start {source}: its {other[0]} is {sizes}, and so are {len(other) - 1} more; give the "
                        f"--model settings of {Path(source.partition(':')[2]) / 'config.json'}, and shards of the same "
                        "extractors")
    system.load_state_dict(given, strict=False)
    new = sorted({name.partition(".")[0] for name in own if name not in given})
    left = sorted({".".join(name.split(".")[:3]) for name in given if name not in own})
    before, now = (vars(each.config) for each in (model, system))
    other = [f"{name} {before[name]} is {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    notes = {"new in this model": new, "left behind": left, "other settings": other}
    said = [f"{what}: {', '.join(each)}" for what, each in notes.items() if each]
    return "; ".join([f"the weights of {source}", *said])


def _from_bert(source: str, folder: Path, vocabulary: Path | None) -> Start:
    found = bert.describe(folder)
    tokenizer = Tokenizer.from_bert(folder)
    _require_same_words(tokenizer, vocabulary, folder)
    return Start(tokenizer, found.source.sha256, partial(_fill_from_bert, source, found))


def _fill_from_bert(source: str, found: bert.BERT, system: System) -> str:
    return f"{', '.join(bert.begin(system, found))} of {source}"


def _from_vit(source: str, place: Path, vocabulary: Path | None) -> Start:
    """Pictures alone: the words are the run's own."""
    found = Source.open(place)
    return Start(None, found.sha256, partial(_fill_from_vit, source, found))


def _fill_from_vit(source: str, found: Source, system: System) -> str:
    begin = beit.begin if isinstance(system, MultiwaySystem) else vit.begin
    return f"{', '.join(begin(system, found))} of {source}"


def _require_same_words(tokenizer: Tokenizer | None, vocabulary: Path | None, folder: Path) -> None:
    if vocabulary is not None and tokenizer and Tokenizer.from_vocab(vocabulary).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{vocabulary} holds other words, or another case, than {folder}, whose weights know only "
                        "their own; leave out --vocabulary")
