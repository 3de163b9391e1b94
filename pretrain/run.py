"""`opt pretrain`: a system's preset, shards and a folder become a run; the same command again goes on with it.

    config --processes, shards, words, weights to start with--> Trainer --> out/{config.json, model/, ...}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import tyro

from opt.config import UserError
from opt.data.corpora import open_shards
from opt.data.manifest import Manifest
from opt.data.remote import Cache
from opt.data.shards import ShardReader
from opt.data.tokenizer import Tokenizer
from opt.history import History, Stage, corpora_of
from opt.progress import in_bytes
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.system import DataFacts, System, build, load, names, system_type
from pretrain.dry_run import describe, require_memory
from pretrain.folder import identity, keep_identity, require_same_run, run_folder
from pretrain.limits import check
from pretrain.parallel import of_first, processes, say
from pretrain.profile import Profile
from pretrain.start import Start, find_start
from pretrain.state import newest_state
from pretrain.tensorboard import TensorBoard
from pretrain.trainer import Trainer

ModelConfig = TypeVar("ModelConfig")


@dataclass(frozen=True)
class PretrainConfig(Generic[ModelConfig]):
    """What to train, on what, where to, and how."""

    system: tyro.conf.Positional[str]
    """A system's preset: opt.tiny, opt.small, opt.paper; clip, vilt, albef, blip, coca, vlmo, beit3, cots and vilem,
    each tiny, trimodal or base; dvae.tiny, dvae.base (docs/systems.md)."""
    shards: tuple[str, ...]
    """Folders that `opt extract` wrote, or URLs of such folders (s3://bucket/train, https://...)."""
    out: Path
    """The run's folder. The same command again goes on from its newest checkpoint."""
    model: ModelConfig
    proportions: tuple[float, ...] = ()
    """How often samples come from each of several --shards, on any scale; left out, every sample comes equally often.
    """
    validation: str | None = None
    """Held-out shards, folder or URL: their loss is measured every --loop.validate-every steps, or whenever a state is
    saved, and the model that did best is kept in the run's folder as best/."""
    cache: Path = Path("~/.cache/opt/shards")
    """What is read from URLs is kept here, shared by all runs."""
    cache_gigabytes: float = 50.0
    """Most that the cache takes of the disk; what was used longest ago goes first."""
    start: tuple[str, ...] = ()
    """model:FOLDER begins with the weights and the words of a saved model of the same system (a run's model folder).
    bert:FOLDER begins the text network with the weights and the vocabulary of a BERT: a folder as Hugging Face saves
    it, with config.json, model.safetensors or pytorch_model.bin, and vocab.txt; vit:PLACE the pictures' tower with the
    weights of a ViT or DeiT, for vlmo also of a BEiT; both may be given. Sizes must be the model's (opt.paper fits
    bert-base, cased and uncased): a mismatch is answered with the --model options to give. Without --start all weights
    are new."""
    vocabulary: Path | None = None
    """A vocab.txt to read words from; without it (and without --start) WordPiece is trained on the captions of the
    shards. Cased or lower-cased by the tokenizer_config.json beside it, else cased when it holds upper-case letters."""
    vocabulary_size: int = 2000
    """Largest vocabulary trained on the captions."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well, into the run's folder."""
    profile: int = 0
    """Trace so many steps, after three, into the run's folder: profile/trace.json for chrome://tracing or Perfetto."""
    dry_run: bool = False
    """Say what would be trained, what memory, disk and time it takes, and stop."""

    @classmethod
    def prepare(cls, argv: list[str]) -> tuple[Any, Any]:
        """The type and values to begin with: those of the preset named first on the line."""
        words = [word for word in argv if not word.startswith("-")]
        first = argv[0] if argv and words and argv[0] == words[0] else ""
        preset = next((word for word in words if word.partition(".")[0] in names()), first)
        kind: Any = cls
        if not preset:
            return kind[type(load("opt.tiny").model)], None
        begin = load(preset)
        missing: Any = tyro.MISSING
        return kind[type(begin.model)], kind(
            preset, missing, missing, begin.model, vocabulary_size=begin.vocabulary_size, loop=begin.loop,
            optim=begin.optim,
        )


def pretrain(config: PretrainConfig) -> None:
    """Train a system on shards; run the same command again to go on after any stop (docs/training.md).

    Example: opt pretrain opt.tiny --shards runs/shards/train --out runs/first --loop.steps 500

    From BERT: opt pretrain opt.paper --start bert:bert-base-uncased --shards runs/shards/train --out runs/paper

    Eight GPUs: torchrun --nproc-per-node 8 -m opt pretrain opt.paper --shards runs/shards/train --out runs/paper
    """
    require(config)
    with processes() as device:
        run(config, device)


def require(config: PretrainConfig) -> None:
    """Raises UserError for settings out of range."""
    check(config)
    check(config.loop, "loop")
    check(config.optim, "optim")
    if config.vocabulary is not None and not system_type(config.system.partition(".")[0]).reads_text:
        raise UserError(f"{config.system} reads no words; leave out --vocabulary")


def run(config: PretrainConfig, device: torch.device) -> None:
    """One run of a process that has joined the others (`processes`)."""
    cache = Cache(config.cache.expanduser(), config.cache_gigabytes)
    reader = open_shards(config.shards, cache)
    _say_what_the_cache_holds(config, reader)
    held_out = _held_out(config, reader, cache)
    start = find_start(config.start, config.vocabulary, config.out) if config.start else None
    system = _system(config, reader, start, device)
    if (system.preparer().cost(reader.lengths) <= 1).all():  # of what shows anything, the first entry comes on top
        raise UserError(f"{reader.place} holds nothing that {config.system} reads in this stage: no captions, pictures "
                        "or speech that it is shown; give other --shards")
    if start is not None:
        say(f"begins with {start.fill(system)}")
    kinds = "+".join(source.partition(":")[0] for source in config.start)
    began = f"{kinds} {start.sha256}" if start else ""
    history = (*(start.history if start else ()), Stage("pretrain", config.system, corpora_of(reader), began))
    train(system, reader, config, device, history, start=start, proportions=config.proportions, held_out=held_out)


class RunConfig(Protocol):
    """What every run's configuration holds; all its other settings are kept beside the run."""

    @property
    def out(self) -> Path: ...
    @property
    def loop(self) -> LoopConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def tensorboard(self) -> bool: ...
    @property
    def profile(self) -> int: ...
    @property
    def dry_run(self) -> bool: ...


def train(
    system: System, reader: ShardReader, config: RunConfig, device: torch.device, history: History, data: str = "",
    start: Start | None = None, proportions: tuple[float, ...] = (), held_out: ShardReader | None = None,
) -> None:
    """Train in `config.out`, or go on with the run there, or only say what would be trained (`config.dry_run`).

    history: the stages of the model, this one the last. data: what else than the shards fixes what is learned from.
    Raises UserError where other settings, data or weights to start with made the run.
    """
    begin = partial(Trainer, system, reader, config.out, config.loop, config.optim, proportions, held_out, device,
                    history)
    told = identity(config, system, reader, held_out, start, data)
    if config.dry_run:
        of_first(lambda: require_same_run(config.out, told))
        describe(begin(), config.out)
        return
    with run_folder(config.out):
        of_first(lambda: keep_identity(config.out, told, system))
        trainer = begin()
        model = config.out / "model"
        if trainer.finished and (model / "config.json").exists():
            say(f"{config.out} is finished: {_outcome(trainer)}")
            return
        trainer.run(Profile(config.out / "profile", config.profile) if config.profile else None,
                    TensorBoard(config.out / "tensorboard", trainer.step) if config.tensorboard else None)
    say(f"trained {_outcome(trainer)}")


def _outcome(trainer: Trainer) -> str:
    """What has come of a run that is finished, in words."""
    early = f", ended early: no better loss since step {trainer.best.step:,}"
    best = f", the best one {trainer.folder / 'best'}"
    return (f"{trainer.step} steps{early if trainer.step < trainer.loop.steps else ''}; the model is "
            f"{trainer.folder / 'model'}{best if trainer.best.step else ''}")


def _say_what_the_cache_holds(config: PretrainConfig, reader: ShardReader) -> None:
    size = sum(shard.bytes for shard in reader.manifest.shards)
    if any("://" in place for place in config.shards) and size > config.cache_gigabytes * 1e9:
        say(f"the shards are {in_bytes(size)} and --cache-gigabytes {config.cache_gigabytes:g} holds a part: the rest "
            "is fetched again in every epoch")


def _held_out(config: PretrainConfig, reader: ShardReader, cache: Cache) -> ShardReader | None:
    """The shards to validate on. Raises UserError where they hold other features than those trained on."""
    if config.validation is None:
        if config.loop.validate_every or config.loop.patience:
            raise UserError("--loop.validate-every and --loop.patience need --validation: held-out shards")
        return None
    held_out = open_shards([config.validation], cache)
    facts(reader.manifest).require_same(held_out.manifest, Path(config.validation))
    if shared := int(np.isin(held_out.key_hash, reader.key_hash).sum()):
        say(f"{shared:,} of {len(held_out):,} held-out samples have the key of one that is trained on: their loss says "
            "less (`opt shards dedup` leaves such out)")
    return held_out


def _system(config: PretrainConfig, reader: ShardReader, start: Start | None, device: torch.device) -> System:
    torch.manual_seed(config.loop.seed)
    system = config.system.partition(".")[0]
    reads_text = system_type(system).reads_text
    tokenizer = of_first(lambda: _tokenizer(config, reader, start)) if reads_text else None
    try:
        with torch.device("meta"):
            sizes = build(system, config.model, tokenizer, facts(reader.manifest))
        require_memory(sizes, config.loop, device)
        return build(system, config.model, tokenizer, facts(reader.manifest))
    except (ValueError, RuntimeError, ZeroDivisionError) as error:  # sizes that no network can have
        raise UserError(f"the model cannot be built from these --model settings: {error}") from error


def _tokenizer(config: PretrainConfig, reader: ShardReader, start: Start | None) -> Tokenizer:
    """The run's own words where it has begun; else those to start with, to be read, or trained on the captions."""
    if newest_state(config.out / "checkpoints") is not None:
        return Tokenizer.load(config.out)
    if start is not None and start.tokenizer is not None:
        return start.tokenizer
    if config.vocabulary is not None:
        return Tokenizer.from_vocab(config.vocabulary)
    return Tokenizer.train(reader.captions(), config.vocabulary_size)


def facts(manifest: Manifest) -> DataFacts:
    """What the shards fix for every system that reads them."""
    return DataFacts(
        region_width=manifest.region_width, region_classes=manifest.region_classes,
        speech_width=manifest.speech_width, frame_rate=manifest.frame_rate, codebook=manifest.codebook,
        extractors=manifest.extractors, speech_codebooks=manifest.speech_codebooks, codes_grid=manifest.codes_grid,
    )
