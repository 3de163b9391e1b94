"""`opt stages`: a system trained in stages, each a run that begins with the model of the one before.

    preset's list (or --order) --a run each: what its rows show, what is asked, what moves--> out/1-vision, out/2-...

The same command again goes on where it stopped: stages that are finished are left as they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from opt.config import UserError
from opt.data.corpora import open_shards
from opt.data.remote import Cache
from opt.data.shards import ShardReader
from opt.data.tokenizer import Tokenizer
from opt.files import make_folder
from opt.recipe import Stage
from opt.systems.system import load, names, presets, system_module
from pretrain.parallel import of_first, processes, say
from pretrain.run import PretrainConfig, require, run
from pretrain.state import newest_state

ModelConfig = TypeVar("ModelConfig")
WORDS = "words"
"""Folder of the words that all stages share."""


@dataclass(frozen=True)
class StagesConfig(PretrainConfig[ModelConfig]):
    """What to train in stages. --loop.steps are those of all stages together, --out holds a folder for each."""

    order: tuple[str, ...] = ()
    """Names of the stages in another order than the preset's, or some of them."""
    data: tuple[str, ...] = ()
    """Other shards than --shards for a stage: NAME=FOLDER, such as vision=runs/shards/pictures."""


def stages(config: StagesConfig) -> None:
    """Train a system in stages, one after the other; run the same command again to go on (docs/training.md).

    Example: opt stages vlmo.tiny --shards runs/shards/train --out runs/vlmo --loop.steps 1000

    Language first: opt stages vlmo.tiny --order language vision pairs --shards runs/shards/train --out runs/other

    Each stage from its own corpus: opt stages vlmo.base --shards runs/pairs --data vision=runs/pictures
    language=runs/texts --out runs/base
    """
    require(config)
    listed, shards = ordered(config), shards_of(config)
    outs = [config.out / f"{number}-{stage.name}" for number, stage in enumerate(listed, 1)]
    _require_own(config.out, outs)
    with processes() as device, TemporaryDirectory() as scratch:
        cache = Cache(config.cache.expanduser(), config.cache_gigabytes)
        places = dict.fromkeys(shards.get(stage.name, config.shards) for stage in listed)
        readers = [open_shards(each, cache) for each in places]  # all: the last are asked for after days
        vocabulary = config.vocabulary
        if vocabulary is None and not config.start:
            words = Path(scratch) if config.dry_run and not _began(outs[0]) else config.out / WORDS
            vocabulary = of_first(lambda: _words(config, readers, words, _began(outs[0])))
        start = config.start
        for number, (stage, out) in enumerate(zip(listed, outs, strict=True), 1):
            steps = max(round(config.loop.steps * stage.share / sum(each.share for each in listed)), 1)
            say(f"stage {number} of {len(listed)}, {stage.name}: {steps:,} steps in {out}")
            run(dataclasses.replace(
                config, out=out, shards=shards.get(stage.name, config.shards), start=start,
                vocabulary=vocabulary if number == 1 else None, model=dataclasses.replace(config.model, stage=stage),
                loop=dataclasses.replace(config.loop, steps=steps),
            ), device)
            if config.dry_run:
                say(f"the stages behind {stage.name} begin with its model; run it to see what they take")
                return
            start = (f"model:{out / 'model'}",)


def ordered(config: StagesConfig) -> list[Stage]:
    """The stages in order. Raises UserError for a preset without stages, or a stage that it has not."""
    known = {stage.name: stage for stage in load(config.system).stages}
    if not known:
        staged = [f"{system}.{preset}" for system in names() for preset in presets(system_module(system))
                  if load(f"{system}.{preset}").stages]
        raise UserError(f"{config.system} is trained in one stage: opt pretrain; in several are {', '.join(staged)}")
    if unknown := [name for name in config.order if name not in known]:
        raise UserError(f"--order {unknown[0]}: {config.system} has the stages {', '.join(known)}")
    if len(set(config.order)) < len(config.order):
        raise UserError(f"--order {' '.join(config.order)}: a stage comes once")
    return [known[name] for name in config.order or known]


def shards_of(config: StagesConfig) -> dict[str, tuple[str, ...]]:
    """By stage, its own shards. Raises UserError for what is no stage of this training."""
    there = [stage.name for stage in ordered(config)]
    found: dict[str, tuple[str, ...]] = {}
    for given in config.data:
        name, equals, folder = given.partition("=")
        if name not in there or not equals or not folder:
            raise UserError(f"--data {given}: expected NAME=FOLDER, NAME one of {', '.join(there)}")
        found[name] = (*found.get(name, ()), folder)
    return found


def _require_own(out: Path, outs: list[Path]) -> None:
    """Raises UserError where another order of stages was begun in `out`: one would begin with a model of the other."""
    other = [path.name for path in sorted(out.glob("*-*")) if path not in outs and _began(path)]
    if other:
        raise UserError(f"{out} holds the stage {other[0]}, and this order is {', '.join(each.name for each in outs)}; "
                        "give the order that it was begun with, or another --out")


def _began(out: Path) -> bool:
    """Whether a stage has saved a state."""
    return newest_state(out / "checkpoints") is not None


def _words(config: StagesConfig, readers: list[ShardReader], folder: Path, began: bool) -> Path | None:
    """Words trained once on the captions of all stages: the first stage may have none, and all must have the same.

    began: the first stage has them, or those of a --start that is missing now: None. Until then they are made anew, as
    shards and settings may be others.
    """
    path = folder / "tokenizer.json"
    if not began:
        captions = (caption for reader in readers for caption in reader.captions())
        tokenizer = Tokenizer.train(captions, config.vocabulary_size)
        make_folder(folder)
        tokenizer.save(folder)
    return path if path.exists() else None
