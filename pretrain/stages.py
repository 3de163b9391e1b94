"""`opt stages`: a system trained in stages, each a run that begins with the model of the one before.

    preset's list (or --order) --a run each: what its rows show, what is asked, what moves--> out/1-vision, out/2-...

The same command again goes on where it stopped: stages that are finished are left as they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from opt.config import UserError
from opt.data.corpora import open_shards
from opt.data.remote import Cache
from opt.data.tokenizer import Tokenizer
from opt.recipe import Stage
from opt.systems.system import load, names, presets, system_module
from pretrain.parallel import of_first, processes, say
from pretrain.run import PretrainConfig, require, run

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
    with processes() as device:
        vocabulary = config.vocabulary
        if vocabulary is None and not config.start:
            vocabulary = of_first(lambda: _words(config, [shards.get(stage.name, config.shards) for stage in listed]))
        start = config.start
        for number, stage in enumerate(listed, 1):
            out = config.out / f"{number}-{stage.name}"
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


def _words(config: StagesConfig, shards: list[tuple[str, ...]]) -> Path:
    """Words trained once on the captions of all stages: the first stage may have none, and all must have the same."""
    path = config.out / WORDS / "tokenizer.json"
    if not path.exists():
        cache = Cache(config.cache.expanduser(), config.cache_gigabytes)
        captions = (caption for places in dict.fromkeys(shards) for caption in open_shards(places, cache).captions())
        path.parent.mkdir(parents=True, exist_ok=True)
        Tokenizer.train(captions, config.vocabulary_size).save(path.parent)
    return path
