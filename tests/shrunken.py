"""Every preset of every system at a size that tests can train, and rows of made-up samples with pictures for them."""

import dataclasses
import io
from functools import cache
from typing import Any

import numpy as np
import torch
from fixtures import FACTS, fake_sample, tokenizer
from PIL import Image

from opt.data.batch import Batch
from opt.data.pixels import Sight
from opt.data.plan import BatchPlan, Plan, row_keys, split
from opt.data.record import Lengths, Sample
from opt.systems.shared.config import Sizes
from opt.systems.system import System, build, load, names, presets, system_module, system_type

ROWS = 12
SMALL = {"width": 16, "layers": 2, "heads": 2, "inner": 32, "decoder_layers": 1, "alignment_width": 16, "space": 16,
         "dropout": 0.0, "codebook": 16, "widths": (8, 8, 8), "ring_rows": 20}
"""Fields by the names that configurations give them."""
COLOURS = ("red", "blue", "green", "yellow", "purple", "white")

EVERY = [f"{name}.{preset}" for name in names() for preset in presets(system_module(name))
         if preset in ("tiny", "trimodal")]
"""Found by their files: a new system is tested without being named here."""


@cache
def small(preset: str, **changes: Any) -> Any:
    """The preset's configuration, shrunken. Patches of a system that predicts image codes lie on the codes' grid."""
    config, patch = load(preset).model, 4 if system_type(preset.partition(".")[0]).reads_codes else 16
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Sizes):
            value = Sizes(16, 2, 2, 32)
        elif isinstance(value, Sight):
            value = dataclasses.replace(value, size=32, patch=patch, longest=48 if value.fit == "keep" else 0)
        elif field.name in SMALL:
            value = SMALL[field.name]
        config = dataclasses.replace(config, **{field.name: changes.get(field.name, value)})
    return config


def made(preset: str, seed: int = 0, **changes: Any) -> System:
    """A new model of that preset, small, in training mode."""
    torch.manual_seed(seed)
    return build(preset.partition(".")[0], small(preset, **changes), tokenizer(), FACTS).train()


@cache
def sample(number: int, image: bool = True, caption: bool = True, speech: bool = True) -> Sample:
    """Made-up sample `number`, its picture striped in colours of its words."""
    made_up = fake_sample(number, regions=image, caption=caption, speech=speech)
    if not image:
        return made_up
    classes = made_up.pictures[0].classes
    assert classes is not None
    picture = Image.new("RGB", (48 + 8 * (number % 3), 48))
    for place, kind in enumerate(classes):
        picture.paste(COLOURS[kind], (place * 12, 0, place * 12 + 12, 48))
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return dataclasses.replace(made_up, pictures=(dataclasses.replace(made_up.pictures[0], jpeg=file.getvalue()),))


def lacking(number: int) -> Sample:
    """A sample in whose corpus many lack something."""
    return sample(number, image=number % 7 != 6, speech=number % 5 != 4, caption=number % 11 != 10)


def rows(system: System, samples: dict[int, Sample], turn: int = 0) -> BatchPlan:
    """All samples as one batch, tasks dealt and partners drawn by a real plan."""
    preparer = system.preparer()
    lengths = Lengths(
        words=np.array([len((each.caption or "").split()) for each in samples.values()]),
        regions=np.array([len(each.pictures[0].classes) if each.pictures else 0 for each in samples.values()]),
        frames=np.array([0 if each.speech is None else len(each.speech) for each in samples.values()]),
        codes=np.array([64 * bool(each.pictures) for each in samples.values()]),
        jpegs=np.array([1000 * bool(each.pictures) for each in samples.values()]),
    )
    keys = np.arange(len(samples), dtype=np.uint64)
    plan = Plan(0, preparer.cost(lengths), 10**6, preparer.tasks, keys, len(samples))
    batch = plan.batch_at(0)
    return dataclasses.replace(batch, key=row_keys(0, turn, batch.sample))


def batch_of(system: System, samples: dict[int, Sample] | None = None, rank: int = 0, world: int = 1, turn: int = 0
             ) -> Batch:
    """One batch of all samples, or a process's part of it."""
    if samples is None:
        samples = {number: lacking(number) if system.reads_text else sample(number) for number in range(ROWS)}
    return system.preparer()(samples, split(rows(system, samples, turn), rank, world))
