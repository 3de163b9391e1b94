"""A split and a system whose right answers are known.

Picture p is 100 + p pixels wide, its recordings begin with the number p, its captions end with "number p": so a system
can read which picture every part of a sample belongs to, and be as right or as wrong as a test wants.
"""

import io
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eval.result import Provenance
from eval.task import Split, Task
from opt.data.record import Lengths, Picture, Sample
from opt.nn.states import States
from opt.systems.system import System


class FakeReader:
    def __init__(self, samples):
        self.samples = samples
        self.manifest = SimpleNamespace(extractors={}, region_classes=())
        self.fingerprint, self.place = "f" * 64, "shards"

    def __len__(self):
        return len(self.samples)

    def sample(self, number, jpeg=False):
        return self.samples[number]

    @property
    def lengths(self):
        words = np.array([len((sample.caption or "").split()) for sample in self.samples])
        codes = np.array([64 * len(sample.pictures) for sample in self.samples])
        frames = np.array([0 if sample.speech is None else len(sample.speech) for sample in self.samples])
        return Lengths(words, np.zeros_like(words), frames, codes)

    def keys(self):
        return (sample.key for sample in self.samples)

    def captions(self):
        return (sample.caption for sample in self.samples if sample.caption is not None)


class FakeSystem(System):
    """Knows which picture each part belongs to; `blurred` modalities all look alike to it."""

    name = "fake"
    device = torch.device("cpu")

    def __init__(self, blurred=()):
        super().__init__()
        self.blurred = set(blurred)
        self.calls = {"embed": 0, "alone": 0, "fuse": 0}

    def number(self, sample, modality):
        if modality in self.blurred:
            return 0
        if modality == "text":
            return int(sample.caption.split()[-1])
        if modality == "image":
            return sample.pictures[0].width - 100
        return int(sample.speech[0, 0])

    def embed(self, samples, modalities):
        self.calls["embed"] += len(samples)
        vectors = torch.nn.functional.one_hot(torch.tensor([self.number(s, modalities[0]) for s in samples]), 64)
        return torch.nn.functional.normalize(vectors.float(), dim=-1)

    def alone(self, samples, modality):
        self.calls["alone"] += len(samples)
        numbers = torch.tensor([[float(self.number(sample, modality))] for sample in samples])
        return States(numbers, np.ones(len(samples), np.int64))

    def fuse(self, parts, rows):
        numbers = torch.cat([parts[name].take(rows[name]).hidden for name in parts], dim=1)
        self.calls["fuse"] += len(numbers)
        return (numbers == numbers[:, :1]).all(1).float()

    def features(self, samples, modalities):
        noise = torch.Generator().manual_seed(len(modalities))
        vectors = sum(
            torch.nn.functional.one_hot(torch.tensor([self.number(s, m) for s in samples]), 64) for m in modalities
        )
        return vectors.float() + 0.1 * torch.randn(len(samples), 64, generator=noise)

    def generate_text(self, samples, modalities, sampling):
        return [f"Caption, number {self.number(sample, modalities[-1])}!" for sample in samples]

    def generate_codes(self, samples, modalities, sampling):
        return torch.tensor([self.number(sample, "text") for sample in samples])[:, None, None].expand(-1, 8, 8)


def jpeg(number):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number * 20 % 256, 40, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_samples(pictures, narrations=1):
    return [
        Sample(
            key=f"scene-{number}",
            pictures=(Picture(100 + number, 10, codes=np.full((8, 8), number, np.int16), jpeg=jpeg(number)),),
            narration=narration,
            caption=f"telling {narration} of number {number}",
            speech=np.full((3, 2), number, np.float16),
        )
        for number in range(pictures)
        for narration in range(narrations)
    ]


@pytest.fixture
def make_task(tmp_path):
    """make_task(samples or (pictures, narrations), blurred=()) -> Task on a FakeSystem, results in tmp_path."""

    def make(samples, blurred=(), limit=None, batch=4):
        samples = make_samples(*samples) if isinstance(samples, tuple) else samples
        provenance = Provenance("fake", "a" * 64, "f" * 64, len(samples), 0, "opt eval fake", "0.1.0")
        folder = tmp_path / "results"
        return Task(
            "fake", FakeSystem(blurred), Split(FakeReader(samples), limit), folder, batch, provenance, time.monotonic()
        )

    return make
