"""The dVAE as a system: pixels as extraction sees them, terms, annealing, training, resuming, use by extraction."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_shards, tokenizer
from PIL import Image
from stopping import stopped_equals_whole

from feature_extract.audio import AudioSettings
from feature_extract.extractors import open_extractors
from feature_extract.regions import RegionSettings
from opt.checkpoint import from_pretrained, save_pretrained
from opt.config import UserError
from opt.data.batch import Batch
from opt.data.plan import Plan
from opt.data.record import Picture, Sample
from opt.data.shards import ShardReader
from opt.objectives.term import loss
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.dvae import DVAE, DVAEConfig, base, tiny
from opt.systems.opt import OPT
from opt.systems.opt import tiny as opt_tiny
from opt.systems.system import Progress
from pretrain.run import PretrainConfig, pretrain
from pretrain.trainer import Trainer

MODEL = DVAEConfig(codebook=16, widths=(8, 8, 16))


def coloured(number: int, jpeg: bool = True) -> Sample:
    """A picture of two coloured halves, 96 x 80."""
    colours = np.random.default_rng(number % 5).integers(256, size=(2, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(np.repeat(colours, 40, axis=0)[:, None].repeat(96, axis=1)).save(content, "JPEG", quality=95)
    picture = Picture(96, 80, jpeg=content.getvalue() if jpeg else None)
    return Sample(f"sample{number}", (picture,), 0, "0", "two halves")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    fake_shards(folder, [coloured(number) for number in range(32)])
    return folder


@pytest.fixture
def system() -> DVAE:
    torch.manual_seed(0)
    return DVAE(MODEL, None, FACTS)


@pytest.fixture
def batch(shards: Path, system: DVAE) -> Batch:
    reader, preparer = ShardReader(shards), system.preparer()
    plan = Plan(0, preparer.cost(reader.lengths), 16 * 64, preparer.tasks, reader.key_hash).batch_at(0)
    return preparer({int(number): reader.sample(int(number), jpeg=True) for number in plan.sample}, plan)


def config(shards: Path, out: Path, **changes: object) -> PretrainConfig:
    loop = LoopConfig(**{"steps": 12, "batch_tokens": 8 * 64, "workers": 0, "log_every": 2, "save_every": 4, **changes})
    return PretrainConfig("dvae.tiny", (str(shards),), out, MODEL, loop=loop, optim=OptimConfig(3e-3))


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_presets_have_their_sizes():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in DVAE(preset().model, None, FACTS).parameters()) for preset in (tiny, base)]
    assert sizes == [1_167_459, 24_902_019]
    assert tiny().model.codebook == 512 and base().model.codebook == 8192


def test_pixels_are_those_that_extraction_sees(batch: Batch, shards: Path):
    assert batch.extra["pixels"].shape == (16, 3, 64, 64) and batch.extra["pixels"].dtype == torch.uint8
    assert batch.tokens == 16 * 64
    stored = {sample.key: sample for sample in map(lambda n: ShardReader(shards).sample(n, jpeg=True), range(32))}
    picture = Image.open(io.BytesIO(stored[batch.keys[3]].pictures[0].jpeg)).convert("RGB")
    squeezed = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(batch.extra["pixels"][3].permute(1, 2, 0).numpy(), squeezed)


@pytest.mark.parametrize("workers", [0, 1])
def test_records_without_a_stored_picture_are_a_sentence(tmp_path: Path, workers: int):
    fake_shards(tmp_path / "shards", [coloured(number, jpeg=False) for number in range(8)])
    with pytest.raises(UserError, match="^sample 'sample.' holds no stored picture.*extracted without --no-jpeg$"):
        pretrain(config(tmp_path / "shards", tmp_path / "run", workers=workers))


def test_temperature_falls_by_equal_factors_to_a_sixteenth_and_stays(system: DVAE):
    fractions = (0.0, 0.35, 0.7, 0.9, 1.0)
    temperatures = [system.temperature(Progress(0, fraction)) for fraction in fractions]
    assert temperatures == pytest.approx([1.0, 0.25, 1 / 16, 1 / 16, 1 / 16])


def test_terms_are_what_they_say(system: DVAE, batch: Batch):
    torch.manual_seed(3)
    terms = system(batch, Progress(0, 0.2)).terms
    pixels = batch.extra["pixels"].numpy() / 255
    torch.manual_seed(3)
    drawn, logits = system.dvae(torch.from_numpy(pixels).float(), system.temperature(Progress(0, 0.2)))
    assert terms["reconstruction"].mean().item() == pytest.approx(((drawn.detach().numpy() - pixels) ** 2).mean(), 1e-4)
    codes = logits.argmax(dim=1)
    assert terms["codes_used"].mean().item() == len(np.unique(codes.numpy()))
    decoded = system.dvae.decode(codes[:8]).detach().numpy()
    assert terms["error_of_codes"].mean().item() == pytest.approx(((decoded - pixels[:8]) ** 2).mean(), rel=1e-4)
    share = logits.softmax(1).mean((0, 2, 3)).detach().numpy()
    assert terms["divergence"].mean().item() == pytest.approx((share * np.log(16 * share)).sum(), abs=1e-4)
    weighted = 100 * terms["reconstruction"].mean() + 0.05 * terms["divergence"].mean()
    torch.testing.assert_close(loss(terms), weighted)


def test_divergence_of_places_is_a_mean_over_places(batch: Batch):
    torch.manual_seed(0)
    system = DVAE(dataclasses.replace(MODEL, divergence="place"), None, FACTS)
    term = system(batch, Progress(0, 0.0)).terms["divergence"]
    probability = system.dvae.logits(batch.extra["pixels"].float() / 255).softmax(1)
    expected = (probability * (16 * probability).log()).sum(1).mean()
    assert term.mean().item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_picture_shows_originals_over_what_their_codes_give(system: DVAE, batch: Batch):
    picture = system.illustrate(batch)
    assert picture.shape == (128, 512, 3) and picture.dtype == torch.uint8
    torch.testing.assert_close(picture[:64, 64:128], batch.extra["pixels"][1].permute(1, 2, 0))
    codes = system.dvae.encode(batch.extra["pixels"][1:2].float() / 255)
    decoded = 255 * system.dvae.decode(codes)[0].permute(1, 2, 0)
    assert (picture[64:, 64:128] - decoded).abs().max() < 1


def test_it_learns_pictures_better_than_their_mean(shards: Path, tmp_path: Path):
    """What codes give must be nearer than the mean of all pictures is: the baseline of a decoder that ignores them."""
    pretrain(config(shards, tmp_path, steps=80, log_every=20, save_every=80))
    reader = ShardReader(shards)
    jpegs = [reader.sample(number, jpeg=True).pictures[0].jpeg for number in range(32)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).resize((64, 64))) for jpeg in jpegs]) / 255
    last = lines(tmp_path)[-1]["losses"]
    assert last["error_of_codes"] < 0.6 * ((pixels - pixels.mean(0)) ** 2).mean()
    assert last["codes_used"] > 4


def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped_equals_whole(lambda out: pretrain(config(shards, out)), tmp_path, monkeypatch)
    pictures = {run: {path.name: path.read_bytes() for path in (tmp_path / run / "pictures").iterdir()}
                for run in ("whole", "stopped")}
    assert list(sorted(pictures["whole"])) == [f"step-{number:08d}.png" for number in (4, 8, 12)]
    assert pictures["stopped"] == pictures["whole"]


def test_drawing_pictures_leaves_training_as_it_was(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Often saved and seldom saved end alike, even where drawing is random and modules behave otherwise in training."""
    pretrain(config(shards, tmp_path / "seldom", save_every=12))
    modes, step = [], Trainer.train_step

    def restless(self: DVAE, batch: Batch) -> torch.Tensor:
        modes.append(self.training)
        return (256 * torch.rand(4, 4, 3)).to(torch.uint8)

    def watched(self: Trainer, batches: list[Batch]) -> object:
        modes.append(self.system.training)
        return step(self, batches)

    monkeypatch.setattr(DVAE, "illustrate", restless)
    monkeypatch.setattr(Trainer, "train_step", watched)
    pretrain(config(shards, tmp_path / "often", save_every=1))
    assert modes == [True, False] * 12
    seldom, often = (from_pretrained(tmp_path / run / "model").state_dict() for run in ("seldom", "often"))
    assert all(torch.equal(seldom[name], often[name]) for name in seldom)


def test_extraction_reads_a_trained_models_folder(shards: Path, tmp_path: Path):
    pretrain(config(shards, tmp_path, steps=2))
    word = f"dvae:{tmp_path / 'model'}"
    codes = open_extractors("none", "none", word, RegionSettings(), AudioSettings(), "cpu").codes
    picture = Image.open(io.BytesIO(coloured(1).pictures[0].jpeg))
    system = from_pretrained(tmp_path / "model")
    pixels = torch.from_numpy(np.array(picture.resize((64, 64), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    np.testing.assert_array_equal(codes(picture), system.dvae.encode(pixels[None].float() / 255)[0].numpy())
    assert codes.codebook == 16


def test_what_is_no_dvaes_folder_gives_no_codes(shards: Path, tmp_path: Path):
    pretrain(config(shards, tmp_path / "run", steps=1))
    save_pretrained(OPT(opt_tiny().model, tokenizer(), FACTS), tmp_path / "opt")
    for folder, said in (("run", "the folder of a run"), ("opt", "holds a model of system 'opt'")):
        with pytest.raises(UserError, match=said):
            open_extractors("none", "none", f"dvae:{tmp_path / folder}", RegionSettings(), AudioSettings(), "cpu")


def test_dry_run_needs_no_words(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pretrain(dataclasses.replace(config(shards, tmp_path / "run"), dry_run=True))
    said = capsys.readouterr().out
    assert "dvae: 20,235 parameters\n" in said and "64 tokens on average" in said


@pytest.mark.parametrize("changes", [{"temperature_end": 2.0}, {"temperature_end": 0.0}, {"anneal_share": 0.0},
                                     {"widths": (9, 8, 8)}, {"widths": (8, 0, 8)}, {"codebook": 0},
                                     {"codebook": 40_000}, {"reconstruction_weight": -1.0},
                                     {"divergence_weight": float("nan")}])
def test_impossible_settings_are_refused(shards: Path, tmp_path: Path, changes: dict):
    with pytest.raises(UserError, match="cannot be built"):
        pretrain(dataclasses.replace(config(shards, tmp_path), model=dataclasses.replace(MODEL, **changes)))
