"""What a system reads decides what a sample has: pixels or features, speech or none."""

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_sample, fake_shards, tokenizer
from PIL import Image

from eval import speech
from eval.reads import open_shards, reads
from eval.retrieval import RetrievalConfig, measure
from eval.task import open_split
from opt.config import UserError
from opt.systems.system import DataFacts, System, build, load


class Looks(System):
    """Looks at pixels: a picture's vector is its colours."""

    name = "looks"

    def __init__(self, facts: DataFacts = FACTS) -> None:
        super().__init__()
        self.facts = facts

    def preparer(self):
        return SimpleNamespace(jpeg=True)

    def embed(self, samples, modalities):
        opened = [Image.open(io.BytesIO(sample.pictures[0].jpeg)).resize((4, 4)) for sample in samples]
        pixels = torch.tensor(np.stack([np.asarray(one, np.float32).ravel() for one in opened]))
        return torch.nn.functional.normalize(pixels, dim=-1)


def opt(**facts) -> System:
    return build("opt", load("opt.tiny").model, tokenizer(), dataclasses.replace(FACTS, **facts))


def photo(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(content, "JPEG")
    return content.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """0: regions and a jpeg, 1: regions alone, 2: a jpeg alone, 3: neither; all told and spoken."""
    samples = [fake_sample(number) for number in range(4)]
    pictures = [
        dataclasses.replace(samples[0].pictures[0], jpeg=photo(0)), samples[1].pictures[0],
        dataclasses.replace(samples[2].pictures[0], jpeg=photo(2), regions=None, boxes=None, classes=None, scores=None,
                            codes=None),
    ]  # fmt: skip
    given = [(picture,) for picture in pictures] + [()]
    folder = tmp_path_factory.mktemp("reads") / "shards"
    fake_shards(folder, [dataclasses.replace(one, pictures=some) for one, some in zip(samples, given, strict=True)])
    return folder


def test_pictures_are_there_as_the_system_takes_them_in(shards):
    seen = {name: open_split(shards, None, system).has for name, system in (
        ("pixels", Looks()), ("features", opt()), ("blind", opt(region_width=0, codebook=0)),
        ("deaf", opt(speech_width=0)))}
    assert {name: has["image"].tolist() for name, has in seen.items()} == {
        "pixels": [True, False, True, False], "features": [True, True, False, False], "blind": [False] * 4,
        "deaf": [True, True, False, False]}
    assert {name: has["audio"].tolist() for name, has in seen.items()} == {
        "pixels": [True] * 4, "features": [True] * 4, "blind": [True] * 4, "deaf": [False] * 4}
    assert all(has["text"].all() for has in seen.values())


def test_samples_come_with_pixels_for_who_looks_at_them(shards):
    assert open_split(shards, None, Looks()).sample(0).pictures[0].jpeg == photo(0)
    assert open_split(shards, None, opt()).sample(0).pictures[0].jpeg is None


def test_features_that_nobody_reads_may_come_from_any_network(shards):
    strange = {"regions": {"weights_sha256": "another"}}
    with pytest.raises(UserError, match="another extractor"):
        open_shards(shards, opt(extractors=strange))
    open_shards(shards, Looks(dataclasses.replace(FACTS, extractors=strange, region_width=99)))
    open_shards(shards, opt(extractors=strange, region_width=0))
    with pytest.raises(UserError, match="10 numbers, not 11"):
        open_shards(shards, Looks(dataclasses.replace(FACTS, speech_width=11)))


def test_what_a_system_never_learned_is_a_reason(shards, make_task):
    deaf = reads(opt(speech_width=0))
    assert deaf.unread(("text", "image", "audio")) == "the model was trained without audio"
    assert deaf.unread(("text", "image")) == "" == reads(Looks()).unread(("text", "image", "audio"))
    assert reads(Looks()).absent(("text", "image")) == (
        "the shards hold no caption with a picture; the model looks at stored JPEGs")
    task = dataclasses.replace(make_task((2, 1)), split=open_split(shards, None, opt(speech_width=0)))
    with pytest.raises(UserError, match="nothing to transcribe: the model was trained without audio"):
        speech.measure(task)
    with pytest.raises(UserError, match="nothing to search: the model was trained without audio"):
        measure(task, RetrievalConfig(shards, shards, directions=("text_to_audio",)))
