"""Every equation of the paper, computed again from the samples themselves: numpy, one target at a time.

Shape legend: M encoder states of one row, one vector a token.
"""

import dataclasses

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_sample, tokenizer

from opt.data.batch import Batch
from opt.data.layout import cross_layout, self_layout
from opt.data.plan import BatchPlan
from opt.data.record import Sample
from opt.nn.decoder import Decoder
from opt.systems.opt import OPT, OPTConfig, Shares
from opt.systems.opt.tasks import TASKS
from opt.systems.system import Progress

CONFIG = OPTConfig(width=32, layers=2, heads=2, inner=64, decoder_layers=2, dropout=0.0, modality_rate=0.0,
                   token_rate=0.4, pair_rate=0.0, shares=Shares())
SAMPLES = [fake_sample(number) for number in range(6)]


@pytest.fixture(scope="module")
def system() -> OPT:
    torch.manual_seed(1)
    system = OPT(CONFIG, tokenizer(), FACTS).eval()
    with torch.no_grad():  # weights large enough that every part of a formula shows
        for parameter in system.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return system


def prepare(system: OPT, task: str) -> Batch:
    numbers = np.arange(len(SAMPLES))
    partners = np.stack([np.roll(numbers, -1), np.roll(numbers, -2)], axis=1)
    rows = BatchPlan(numbers, np.full(len(numbers), TASKS.index(task)), partners,
                     np.arange(100, 100 + len(numbers)).astype(np.uint64), 0, 0, len(numbers))
    return system.preparer()(dict(enumerate(SAMPLES)), rows)


@torch.no_grad()
def mean(system: OPT, batch: Batch, name: str) -> float:
    return system(batch, Progress(0, 0.0)).terms[name].mean().item()


@torch.no_grad()
def states(system: OPT, batch: Batch) -> list[torch.Tensor]:
    """M (Eq. 1) of every row: a row is one sequence, since alignment is off and nothing is left out."""
    lengths = torch.diff(batch.views["encoder"].first, append=torch.tensor([len(batch.views["encoder"].gather)]))
    return list(system.encode(batch)[0].split(lengths.tolist()))


def hidden(batch: Batch, name: str) -> list[tuple[int, int]]:
    """Row and place in it of each target."""
    first = batch.views["encoder"].first.numpy()
    rows = np.searchsorted(first, batch.targets[name].index.numpy(), side="right") - 1
    return list(zip(rows.tolist(), (batch.targets[name].index.numpy() - first[rows]).tolist(), strict=True))


def words(sample: Sample) -> list[int]:
    return tokenizer().encode(sample.caption or "").tolist()


def minus_log_softmax(logits: torch.Tensor, target: int) -> float:
    values = logits.double().numpy()
    return float(np.log(np.exp(values - values.max()).sum()) + values.max() - values[target])


@torch.no_grad()
def test_equation_2_masked_words(system: OPT) -> None:
    batch = prepare(system, "mlm")
    m, losses = states(system, batch), []
    for row, place in hidden(batch, "mlm"):
        logits = system.word_head(m[row][place][None], system.text.token.weight)[0]
        losses.append(minus_log_softmax(logits, words(SAMPLES[row])[place - 1]))
    assert losses and mean(system, batch, "mlm") == pytest.approx(np.mean(losses), rel=1e-5)


@torch.no_grad()
def test_equations_4_and_5_masked_regions(system: OPT) -> None:
    batch = prepare(system, "mvm")
    m, distances, entropies = states(system, batch), [], []
    for row, place in hidden(batch, "regions"):
        picture, region = SAMPLES[row].pictures[0], place - len(words(SAMPLES[row])) - 2
        predicted = system.region_head(m[row][place]).double().numpy()
        distances.append(np.square(predicted - picture.regions[region].astype(np.float64)).mean())
        entropies.append(minus_log_softmax(system.class_head(m[row][place]), int(picture.classes[region])))
    assert mean(system, batch, "mvfr") == pytest.approx(np.mean(distances), rel=1e-5)
    assert mean(system, batch, "mrc") == pytest.approx(np.mean(entropies), rel=1e-5)


@torch.no_grad()
def test_equations_7_and_8_masked_frames(system: OPT) -> None:
    batch = prepare(system, "mam")
    m, distances, contrasts = states(system, batch), [], []
    for row, place in hidden(batch, "frames"):
        speech = SAMPLES[row].speech.astype(np.float64)
        frame = place - len(words(SAMPLES[row])) - 2 - len(SAMPLES[row].pictures[0].regions)
        predicted = system.frame_head(m[row][place]).double().numpy()
        distances.append(np.square(predicted - speech[frame]).mean())
        cosine = speech @ predicted / np.linalg.norm(speech, axis=1) / np.linalg.norm(predicted)
        similar = np.exp(cosine / CONFIG.contrast_temperature)
        contrasts.append(-np.log(similar[frame] / similar.sum()))
    assert mean(system, batch, "mafr") == pytest.approx(np.mean(distances), rel=1e-5)
    assert mean(system, batch, "mac") == pytest.approx(np.mean(contrasts), rel=1e-5)


@torch.no_grad()
def written(decoder: Decoder, table: torch.Tensor, start: int, labels: list[int], m: torch.Tensor) -> list[float]:
    """- log P(label | labels before it, M), each from a run over nothing but what came before."""
    losses = []
    for place, label in enumerate(labels):
        ids, size = torch.tensor([start, *labels[:place]]), np.array([place + 1])
        cross = cross_layout(np.array([0]), size, np.array([0]), np.array([len(m)]))
        states_LD = decoder(ids, torch.arange(place + 1), self_layout(size), m, cross, table)
        losses.append(minus_log_softmax(decoder.logits(states_LD[-1], table), label))
    return losses


def test_equation_9_written_text(system: OPT) -> None:
    batch, losses = prepare(system, "dtr"), []
    for sample, m in zip(SAMPLES, states(system, batch), strict=True):
        labels = [*words(sample), tokenizer().eos]
        losses += written(system.text_decoder, system.text.token.weight, tokenizer().bos, labels, m)
    assert mean(system, batch, "dtr") == pytest.approx(np.mean(losses), rel=1e-5)


def test_equation_10_written_codes_all_64_of_them(system: OPT) -> None:
    batch, losses = prepare(system, "dir"), []
    for sample, m in zip(SAMPLES, states(system, batch), strict=True):
        labels = sample.pictures[0].codes.ravel().tolist()
        losses += written(system.code_decoder, system.code_table.weight, FACTS.codebook, labels, m)
    assert len(losses) == 64 * len(SAMPLES) == batch.counts["codes"]
    assert mean(system, batch, "dir") == pytest.approx(np.mean(losses), rel=1e-5)


def test_no_code_is_out_of_the_vocabulary_and_every_code_can_be_written(system: OPT) -> None:
    """The published code numbers its 8,192 codes 1 to 8,192 in a vocabulary of 8,192."""
    assert len(system.code_decoder.bias) == FACTS.codebook, "the start is never written"
    assert len(system.code_table.weight) == FACTS.codebook + 1
    extremes = np.resize([0, FACTS.codebook - 1], (8, 8)).astype(np.int16)
    picture = dataclasses.replace(SAMPLES[0].pictures[0], codes=extremes)
    sample = dataclasses.replace(SAMPLES[0], pictures=(picture,))
    nobody, key = np.full((1, 2), -1), np.array([1], np.uint64)
    rows = BatchPlan(np.array([0]), np.array([TASKS.index("dir")]), nobody, key, 0, 0, 1)
    batch = system.preparer()({0: sample}, rows)
    assert batch.writings["codes"].label.tolist() == extremes.ravel().tolist()
    assert np.isfinite(mean(system, batch, "dir"))


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
@torch.no_grad()
def test_equation_11_matching(system: OPT, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, losses = prepare(system, "match"), []
    monkeypatch.setattr(system, "config", dataclasses.replace(CONFIG, matching=form))
    for m, label in zip(states(system, batch), batch.targets["match"].label.tolist(), strict=True):
        logits = system.match_head(torch.tanh(system.pooler.linear(m[0])))
        wanted, sigmoid = np.eye(5)[label], 1 / (1 + np.exp(-logits.double().numpy()))
        losses.append(minus_log_softmax(logits, label) if form == "softmax" else
                      -(wanted * np.log(sigmoid) + (1 - wanted) * np.log(1 - sigmoid)).sum())
    assert mean(system, batch, "match") == pytest.approx(np.mean(losses), rel=1e-5)


@torch.no_grad()
def test_what_is_written_sees_only_what_came_before(system: OPT) -> None:
    """Another token at place j leaves every logit before it bit-equal."""
    for task, name, decoder, table in (("dtr", "text", system.text_decoder, system.text.token.weight),
                                       ("dir", "codes", system.code_decoder, system.code_table.weight)):
        batch = prepare(system, task)
        writing = batch.writings[name]
        m = system.encode(batch)[0][writing.seen]
        starts = np.flatnonzero(writing.positions.numpy() == 0)
        before = decoder(writing.ids, writing.positions, writing.layout, m, writing.context, table)
        for place in (2, 3):
            ids = writing.ids.clone()
            ids[starts + place] = (ids[starts + place] + 1) % len(decoder.bias)
            after = decoder(ids, writing.positions, writing.layout, m, writing.context, table)
            earlier = writing.positions < place
            assert torch.equal(after[earlier], before[earlier])
            assert not torch.equal(after[writing.positions == place], before[writing.positions == place])


@torch.no_grad()
def test_a_missing_modality_is_absent_and_not_zeros(system: OPT) -> None:
    rows = system.preparer()
    for name, field in (("audio", "speech"), ("image", "pictures"), ("text", "caption")):
        rest = [other for other in ("text", "image", "audio") if other != name]
        lacking = [dataclasses.replace(sample, **{field: () if field == "pictures" else None}) for sample in SAMPLES]
        asked = system.encode(rows.inputs(SAMPLES, rest))[0]
        assert torch.equal(asked, system.encode(rows.inputs(lacking, rest))[0])
    silent = [dataclasses.replace(sample, speech=np.zeros_like(sample.speech)) for sample in SAMPLES]
    without, zeros = rows.inputs(SAMPLES, ["text", "image"]), rows.inputs(silent, ["text", "image", "audio"])
    assert not torch.allclose(system.encode(without)[1], system.encode(zeros)[1], atol=1e-3)
