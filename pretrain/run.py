"""`opt pretrain`: a system's preset, shards and a folder become a run; the same command again goes on with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import tyro

from opt import config as configuration
from opt.config import UserError
from opt.data.manifest import Manifest
from opt.data.shards import ShardReader
from opt.data.tokenizer import Tokenizer
from opt.files import write_atomic
from opt.lock import alone
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.system import DataFacts, System, build, load, names, system_type
from pretrain.limits import check
from pretrain.start import Start, find_start
from pretrain.trainer import Trainer

ModelConfig = TypeVar("ModelConfig")

FREE = {"shards", "out", "loop.workers", "loop.log_every", "loop.save_every", "loop.keep", "dry_run"}
"""Settings that may change between the starts of one run: they do not change what is learned."""


@dataclass(frozen=True)
class PretrainConfig(Generic[ModelConfig]):
    """What to train, on what, where to, and how."""

    system: tyro.conf.Positional[str]
    """A system's preset: opt.tiny, opt.small, opt.paper, dvae.tiny, dvae.base (docs/systems.md)."""
    shards: Path
    """Folder that `opt extract` wrote."""
    out: Path
    """The run's folder. The same command again goes on from its newest checkpoint."""
    model: ModelConfig
    start: str | None = None
    """bert:FOLDER begins with the weights and the vocabulary of a BERT: a folder as Hugging Face saves it, with
    config.json, model.safetensors or pytorch_model.bin, and vocab.txt. Its sizes must be the model's (opt.paper fits
    bert-base, cased and uncased); a mismatch is answered with the --model options to give. Without --start all weights
    are new."""
    vocabulary: Path | None = None
    """A vocab.txt to read words from; without it (and without --start) WordPiece is trained on the captions of the
    shards. Cased or lower-cased by the tokenizer_config.json beside it, else cased when it holds upper-case letters."""
    vocabulary_size: int = 2000
    """Largest vocabulary trained on the captions."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    dry_run: bool = False
    """Say what would be trained, and stop."""

    @classmethod
    def prepare(cls, argv: list[str]) -> tuple[Any, Any]:
        """The type and values to begin with: those of the preset named first on the line."""
        words = [word for word in argv if not word.startswith("-")]
        first = argv[0] if argv and words and argv[0] == words[0] else ""
        preset = next((word for word in words if word.partition(".")[0] in names()), first)
        if not preset:
            return PretrainConfig[type(load("opt.tiny").model)], None  # type: ignore[misc]
        begin = load(preset)
        missing: Any = tyro.MISSING
        return PretrainConfig[type(begin.model)], PretrainConfig(  # type: ignore[misc]
            preset, missing, missing, begin.model, vocabulary_size=begin.vocabulary_size, loop=begin.loop,
            optim=begin.optim,
        )


def pretrain(config: PretrainConfig) -> None:
    """Train a system on shards; run the same command again to go on after any stop.

    Example: opt pretrain opt.tiny --shards runs/shards/train --out runs/first --loop.steps 500

    From BERT: opt pretrain opt.paper --start bert:bert-base-uncased --shards runs/shards/train --out runs/paper
    """
    check(config.loop)
    check(config.optim)
    if config.vocabulary is not None and not system_type(config.system.partition(".")[0]).reads_text:
        raise UserError(f"{config.system} reads no words; leave out --vocabulary")
    reader = ShardReader(config.shards)
    start = find_start(config.start, config.vocabulary, config.out) if config.start is not None else None
    system = _system(config, reader, start)
    if start is not None:
        print(f"begins with {start.fill(system)}")
    if config.dry_run:
        describe(config.system, system, reader, config)
    else:
        train(system, reader, config, reader.fingerprint, start)


class RunConfig(Protocol):
    """What every run's configuration holds; all its other settings are kept beside the run."""

    @property
    def out(self) -> Path: ...
    @property
    def loop(self) -> LoopConfig: ...
    @property
    def optim(self) -> OptimConfig: ...


def train(system: System, reader: ShardReader, config: RunConfig, data: str, start: Start | None = None) -> None:
    """Train in `config.out`, or go on with the run there. Raises UserError where other settings, `data` or weights to
    start with made it."""
    with alone(config.out):
        _same_run(config, data, start)
        if start is not None:
            start.tokenizer.save(config.out)
        trainer = Trainer(system, reader, config.out, config.loop, config.optim)
        if trainer.step >= config.loop.steps and (config.out / "model" / "config.json").exists():
            print(f"{config.out} is finished: {trainer.step} steps; its model is {config.out / 'model'}")
            return
        trainer.run()
    print(f"trained {trainer.step} steps; the model is {config.out / 'model'}")


def _system(config: PretrainConfig, reader: ShardReader, start: Start | None) -> System:
    import torch

    torch.manual_seed(config.loop.seed)
    system = config.system.partition(".")[0]
    tokenizer = _tokenizer(config, reader, start) if system_type(system).reads_text else None
    try:
        return build(system, config.model, tokenizer, facts(reader.manifest))
    except (ValueError, RuntimeError, ZeroDivisionError) as error:  # sizes that no network can have
        raise UserError(f"the model cannot be built from these --model settings: {error}") from error


def _tokenizer(config: PretrainConfig, reader: ShardReader, start: Start | None) -> Tokenizer:
    if start is not None:
        return start.tokenizer
    if config.vocabulary is not None:
        return Tokenizer.from_vocab(config.vocabulary)
    return Tokenizer.train(reader.captions(), config.vocabulary_size)


def facts(manifest: Manifest) -> DataFacts:
    """What the shards fix for every system that reads them."""
    return DataFacts(
        region_width=manifest.region_width, region_classes=manifest.region_classes,
        speech_width=manifest.speech_width, frame_rate=manifest.frame_rate, codebook=manifest.codebook,
        extractors=manifest.extractors,
    )


def describe(name: str, system: System, reader: ShardReader, config: RunConfig) -> None:
    """Say what would be trained."""
    parameters = sum(parameter.numel() for parameter in system.parameters())
    costs = system.preparer().cost(reader.lengths)
    words = f", {system.tokenizer.size:,} words in the vocabulary" if system.reads_text else ""
    print(f"{name}: {parameters:,} parameters{words}")
    print(f"{len(reader):,} samples of {costs.mean():.0f} tokens on average")
    print(f"{config.loop.steps:,} steps of {config.loop.batch_tokens:,} tokens: "
          f"{config.loop.steps * config.loop.batch_tokens / max(1, costs.sum()):.1f} epochs")
    print(f"would write to {config.out}")


def _same_run(config: RunConfig, fingerprint: str, start: Start | None) -> None:
    """Refuse to go on with a run under other settings or other data. Raises UserError naming the first difference."""
    path = config.out / "config.json"
    wanted = {**configuration.to_dict(config), "data": fingerprint, "start_sha256": start.sha256 if start else None}
    if path.exists():
        try:
            saved = _flat(json.loads(path.read_text()))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); give another --out") from error
        for key, value in _flat(wanted).items():
            if key not in FREE and saved.get(key) != value:
                raise UserError(f"{config.out} holds a run with {key} = {saved.get(key)!r}, not {value!r}; "
                                "give another --out, or the same settings to go on")
    write_atomic(path, json.dumps(wanted, indent=2).encode())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat

