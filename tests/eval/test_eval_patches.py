"""Systems that look at pixels: clips of several pictures, the user's own pictures, matching from an index."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_sample, fake_shards, tokenizer
from PIL import Image
from workshop import COUNT, write_media

from eval import own_files
from eval.lookup.index import Index, index
from eval.lookup.search import search
from eval.retrieval import RetrievalConfig, measure, open_searches
from eval.task import open_split
from opt.checkpoint import save_pretrained
from opt.cli import _parse, main
from opt.data.shards import ShardReader
from opt.systems.system import DataFacts, System, build, load

FRAMES = 3


def model(name: str, facts: DataFacts) -> System:
    """With random weights, far from its beginning, so that what it sees changes what it says."""
    torch.manual_seed(0)
    system = build(name, load(f"{name}.tiny").model, tokenizer(), facts).eval()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return system


def run(verb, *words: object) -> None:
    verb(_parse(verb, "opt", [str(word) for word in words]))


def clip_of(number: int):
    """A sample that shows FRAMES pictures, each of its own colours; the last of another shape."""
    sample = fake_sample(number)
    random, pictures = np.random.default_rng(number), []
    for frame in range(FRAMES):
        content = io.BytesIO()
        side = (64, 96) if frame == FRAMES - 1 else (64, 64)
        Image.fromarray(random.integers(0, 256, (*side, 3), np.uint8)).save(content, "JPEG")
        pictures.append(dataclasses.replace(sample.pictures[0], jpeg=content.getvalue()))
    return dataclasses.replace(sample, pictures=tuple(pictures))


def test_a_clip_is_found_by_the_mean_of_its_pictures(tmp_path, make_task):
    fake_shards(tmp_path / "shards", [clip_of(number) for number in range(12)])
    system = model("clip", FACTS)
    split = open_split(tmp_path / "shards", None, system)
    assert split.has["image"].all() and len(split.sample(0).pictures) == FRAMES
    task = dataclasses.replace(make_task((2, 1)), system=system, split=split)
    config = RetrievalConfig(tmp_path, tmp_path, by=("alignment",), directions=("text_to_image", "image_to_text"))
    samples = [split.sample(number) for number in range(12)]
    frames_FBE = torch.stack([
        system.embed([dataclasses.replace(one, pictures=(one.pictures[frame],)) for one in samples], ("image",))
        for frame in range(FRAMES)
    ])  # fmt: skip
    mean_BE = torch.nn.functional.normalize(frames_FBE.mean(0), dim=-1)
    torch.testing.assert_close(torch.from_numpy(open_searches(task, config).embed(("image",))), mean_BE,
                               atol=1e-5, rtol=0)
    assert (frames_FBE[0] - mean_BE).norm(dim=-1).min() > 1e-3, "one picture alone is another vector"
    scores_TI = system.embed(samples, ("text",)) @ mean_BE.T
    found = {metric.name: metric.value for metric in measure(task, config).metrics}
    for name, scores in (("text_to_image", scores_TI), ("image_to_text", scores_TI.T)):
        ranks = 1 + (scores > scores.diagonal()[:, None]).sum(1)
        for depth in (1, 5, 10):
            assert found[f"retrieval.{name}.r{depth}"] == pytest.approx((ranks <= depth).float().mean().item())


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """media/ and their shards/, pictures with jpegs."""
    folder = tmp_path_factory.mktemp("own")
    write_media(folder / "media")
    assert main(["extract", "localized_narratives", str(folder / "media"), "--out", str(folder / "shards"),
                 "--workers", "0", "--regions", "none", "--audio", "none", "--codes", "none"]) == 0
    return folder


@pytest.mark.parametrize("name", ["clip", "albef"])
def test_an_own_picture_is_what_its_shards_hold_and_no_network_is_opened(own, tmp_path, monkeypatch, name):
    save_pretrained(model(name, DataFacts(0, (), 0, 0.0, 0)), tmp_path / "model")
    run(index, tmp_path / "model", own / "shards", "--out", tmp_path / "index")
    assert Index(tmp_path / "index").facts.rows == {"text": COUNT, "image": COUNT}
    asked = []
    reopen = own_files.reopen
    monkeypatch.setattr(own_files, "reopen", lambda kinds, device: asked.append(kinds) or reopen(kinds, device))
    picture, out = own / "media/images/p1.jpg", tmp_path / "found.jsonl"
    run(search, tmp_path / "index", "--image", picture, "--for", "image", "--out", out)
    first = json.loads(out.read_text())["found"][0]
    assert first["key"] == "p1" and first["similarity"] == pytest.approx(1, abs=1e-4) and asked == [{}]
    if name == "albef":
        run(search, tmp_path / "index", "--text", "red circle 2", "--rerank", COUNT, "--out", out)
        found = json.loads(out.read_text())["found"]
        reader, system = ShardReader(own / "shards"), model(name, DataFacts(0, (), 0, 0.0, 0))
        pairs = {reader.sample(n).key: dataclasses.replace(reader.sample(n, jpeg=True), caption="red circle 2")
                 for n in range(COUNT)}
        wanted = [system.score([pairs[one["key"]]], ("text", "image")).item() for one in found]
        assert [one["matching"] for one in found] == pytest.approx(wanted, abs=1e-3)
