"""`opt import`: a published checkpoint to a model of ours.

    SOURCE --Source--> opt/weights/<system>.py: convert --Imported--> the system, filled --save_pretrained--> FOLDER

A system can be imported when a file of its name stands in opt/weights; there is no registry. Such a file has

    vocabulary(path) -> Tokenizer                          which reader of Tokenizer opens the checkpoint's words
    convert(source: Source, tokenizer) -> Imported         settings and tensors under our names
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tyro.conf import Positional

from opt.checkpoint import save_pretrained
from opt.config import UserError, read_json
from opt.data.tokenizer import Tokenizer
from opt.systems.system import DataFacts, System, build, names
from opt.weights.source import Source

NO_FEATURES = DataFacts(region_width=0, region_classes=(), speech_width=0, frame_rate=0.0, codebook=0)
"""Of a model that reads pictures and text as they are."""


@dataclass(frozen=True)
class Imported:
    """What `convert` gives. config: of our system. state: tensors by our names.

    fresh: what names of ours begin with that this layout has not; they keep their new values. longer: names of tables
    of ours whose last rows it has not (of tokens that our tokenizer appended).
    """

    config: Any
    tokenizer: Tokenizer | None
    state: dict[str, Tensor]
    fresh: tuple[str, ...] = ()
    longer: tuple[str, ...] = ()


@dataclass(frozen=True)
class Import:
    """A checkpoint, the system it becomes, and where that is written."""

    source: Positional[Path]
    """The checkpoint: a folder as transformers or open_clip have it, or one file (.pth, .pt, .bin, .safetensors)."""
    system: Positional[str]
    """Name of the system, such as clip."""
    out: Path
    """Folder to write the model to."""
    tokenizer: Path | None = None
    """Folder or file of the checkpoint's words, where they do not lie in its folder."""


def import_checkpoint(config: Import) -> None:
    """Turn a published checkpoint into a model that every verb takes; nothing in the files is run.

    Example: opt import clip-vit-base-patch32 clip --out models/clip

    Then: opt eval retrieval models/clip SHARDS
    """
    _require_free(config)
    importer = _importer(config.system)
    source = Source.open(config.source)
    tokenizer = importer.vocabulary(_words(config, source))
    imported, system = _made(config, importer, source, tokenizer)
    new = fill(system, imported, source.path)
    _list(f"{len(source.used)} tensors of {source.path} (SHA-256 {source.sha256}) fill a {config.system}; not used",
          source.unused)
    _list("not in the checkpoint, and new in the model", new)
    save_pretrained(system, config.out, trained=f", imported from {source.path.name} (SHA-256 {source.sha256})")
    print(f"wrote {config.out}: {sum(parameter.numel() for parameter in system.parameters()):,} parameters")


def _made(config: Import, importer: Any, source: Source, tokenizer: Tokenizer) -> tuple[Imported, System]:
    """What the file holds, and a new system of its sizes. Raises UserError for settings and tensors of other kinds than
    the layout has, and for weights that are not finite."""
    try:
        imported = importer.convert(source, tokenizer)
        torch.manual_seed(0)  # what the checkpoint has not is the same each time
        system = build(config.system, imported.config, imported.tokenizer, NO_FEATURES)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{source.path}: its settings or tensors are not those of a {config.system} "
                        f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); give a whole "
                        "checkpoint of that system") from error
    if broken := next((name for name, tensor in imported.state.items() if not tensor.isfinite().all()), None):
        raise UserError(f"{source.path}: what belongs to {broken} holds NaN or infinity; copy the file anew")
    return imported, system


def fill(system: System, imported: Imported, path: Path) -> list[str]:
    """Put the state into a new system; returns the names of ours that keep their new values, whole or in part.

    Raises UserError, with nothing changed, for shapes that do not fit, and for what is missing besides `fresh`.
    """
    ours, state = system.state_dict(), dict(imported.state)
    if strange := sorted(set(state) - set(ours)):
        raise ValueError(f"{imported.config} has no {strange[0]}")
    longer = [name for name in imported.longer if len(state[name]) < len(ours[name])]
    for name in longer:
        state[name] = torch.cat([state[name], ours[name][len(state[name]):]])
    for name, tensor in state.items():
        if tensor.shape != ours[name].shape:
            raise UserError(f"{path}: what belongs to {name} has shape {tuple(tensor.shape)}, expected "
                            f"{tuple(ours[name].shape)}; give the words of this checkpoint (--tokenizer), and files "
                            "that belong together")
    new = [name for name in ours if name not in state]
    if missing := [name for name in new if not name.startswith(imported.fresh)]:
        raise UserError(f"{path} lacks what belongs to {', '.join(missing)}; give a whole checkpoint")
    system.load_state_dict(state, strict=False)
    return sorted([*new, *longer])


def _importer(system: str) -> Any:
    """The file that reads checkpoints of this system. Raises UserError that lists those there are."""
    known = [name for name in names() if importlib.util.find_spec(f"opt.weights.{name}")]
    if system not in known:
        raise UserError(f"no published checkpoints of system {system!r} are read; there are {', '.join(known)}")
    return importlib.import_module(f"opt.weights.{system}")


def _words(config: Import, source: Source) -> Path:
    """Where the checkpoint's words are."""
    place = config.tokenizer or source.folder
    if place is None:
        raise UserError(f"{config.source} is one file and holds no words: give --tokenizer, the folder or file of "
                        "those it was trained with")
    return place


def _require_free(config: Import) -> None:
    """Raises UserError where --out holds something else than an earlier import."""
    path = config.out / "config.json"
    content = read_json(path) if path.is_file() else {"system": config.system}
    if config.out.resolve() == config.source.resolve() or content.get("system") != config.system:
        raise UserError(f"--out {config.out} holds another model, which would be written over: name another folder")


def _list(title: str, entries: list[str]) -> None:
    print(f"{title}: {len(entries) or 'nothing'}", *(f"  {entry}" for entry in entries), sep="\n")
