"""Filled batches compute what plain ones do, in few sizes, and what is filled in reaches no loss."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import varlen
from fixtures import FACTS, fake_sample, tokenizer

from opt.data.batch import Batch
from opt.data.capacity import NO_TARGET, Filled
from opt.data.layout import AttentionLayout
from opt.data.plan import BatchPlan, row_keys
from opt.objectives.masked import token_cross_entropy
from opt.objectives.term import loss
from opt.systems.opt import OPT, OPTConfig
from opt.systems.opt.tasks import TASKS
from opt.systems.system import Progress

CONFIG = OPTConfig(width=32, layers=2, heads=2, inner=64, decoder_layers=1, dropout=0.0, alignment_weight=1.0,
                   alignment_width=16, label_smoothing=0.1)
SAMPLES = {number: fake_sample(number) for number in range(24)}


def model() -> OPT:
    torch.manual_seed(0)
    return OPT(CONFIG, tokenizer(), FACTS)


def plan(rows: int, seed: int = 0, task: str | None = None) -> BatchPlan:
    numbers = np.random.default_rng(seed).permutation(24)[:rows]
    tasks = np.arange(rows) % len(TASKS) if task is None else np.full(rows, TASKS.index(task))
    partners = np.stack([np.roll(numbers, 1), np.roll(numbers, 2)], axis=1)
    return BatchPlan(numbers, tasks, partners, row_keys(seed, 0, numbers), 0, 0, rows)


def both(rows: int, seed: int = 0, task: str | None = None) -> tuple[Batch, Batch]:
    """The same batch as it is, and filled."""
    preparer = model().preparer()
    drawn = plan(rows, seed, task)
    return preparer(SAMPLES, drawn), Filled(preparer, 1024)(SAMPLES, drawn)


def results(system: OPT, batch: Batch) -> dict[str, torch.Tensor]:
    terms = system(batch, Progress(0, 0.0)).terms
    loss(terms).backward()
    gradients = {name: parameter.grad for name, parameter in system.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(list(system.parameters()))
    system.zero_grad()
    return {**{f"loss {name}": term.mean().detach() for name, term in terms.items()}, **gradients}


@pytest.mark.parametrize("kernel", ["buckets", "varlen"])
@pytest.mark.parametrize("task", [None, "mlm", "dtr"])
def test_losses_and_gradients_are_those_of_the_plain_batch(
    task: str | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "varlen":
        varlen.use(monkeypatch)
    system = model()
    plain, filled = both(24, task=task)
    wanted, found = results(system, plain), results(system, filled)
    assert any(name.startswith("loss") and float(value) > 0 for name, value in wanted.items())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_what_is_real_stays_where_it_is() -> None:
    plain, filled = both(12)
    for name, view in plain.views.items():
        other = filled.views[name]
        assert torch.equal(other.gather[: len(view.gather)], view.gather) and torch.equal(other.first, view.first)
        real = len(view.layout.query_borders)
        assert torch.equal(other.layout.query_borders[:real], view.layout.query_borders)
    for name, writing in plain.writings.items():
        longer = filled.writings[name]
        for column in ("ids", "positions", "label", "seen"):
            entries = getattr(writing, column)
            assert torch.equal(getattr(longer, column)[: len(entries)], entries)
        assert (longer.label[len(writing.label):] == NO_TARGET).all()
    assert filled.tokens == plain.tokens and filled.counts.keys() == plain.counts.keys()
    assert all(torch.equal(filled.counts[name], count) for name, count in plain.counts.items())
    assert filled.text is plain.text or torch.equal(filled.text.ids, plain.text.ids)


def layouts(batch: Batch) -> list[AttentionLayout]:
    return [*(view.layout for view in batch.views.values()),
            *(layout for writing in batch.writings.values() for layout in (writing.layout, writing.context))]


def test_many_batches_have_few_sizes() -> None:
    """No sequence is empty, none longer than the bound, and every batch is one of few."""
    sizes, fewest = set(), set()
    for seed in range(24):
        plain, filled = both(20 + seed % 4, seed)
        view = filled.views["encoder"]
        sizes.add((len(view.gather), *(len(writing.ids) for writing in filled.writings.values())))
        fewest.add(len(plain.views["encoder"].gather))
        for layout, real in zip(layouts(filled), layouts(plain), strict=True):
            for borders, longest in zip((layout.query_borders, layout.key_borders), layout.longest.shape, strict=False):
                lengths = torch.diff(borders)
                assert lengths.min() >= 1 and lengths.max() <= longest and longest & longest - 1 == 0
                assert len(lengths) % 32 == 0
            assert layout.pairs == real.pairs and layout.padded == len(layout.inverse) >= real.query_borders[-1]
        assert filled.padded == len(view.gather) + sum(len(writing.ids) for writing in filled.writings.values())
    assert len(fewest) > 20 and len(sizes) <= 6


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 512), (512, 512), (513, 1024), (2047, 2048), (2049, 2560),
                                                  (9959, 10240), (16_384, 16_384), (16_385, 18_432)])
def test_capacities_are_eighths_of_powers_of_two(tokens: int, capacity: int) -> None:
    """What is more than the budget gets a larger capacity; nothing is dropped."""
    assert Filled(model().preparer(), 16_384).capacity(tokens) == capacity


@pytest.mark.parametrize("micro_batch_tokens", [1, 64, 1000, 100_000])
@pytest.mark.parametrize("lengths", [[1], [500], [3] * 1000, [200] * 300, [1] * 40])
def test_filler_is_never_empty_nor_longer_than_the_shortest_bound(micro_batch_tokens: int, lengths: list[int]) -> None:
    filled = Filled(model().preparer(), micro_batch_tokens)
    queries, keys = filled._filler(np.array(lengths), 7 * np.array(lengths))
    assert len(queries) == len(keys) and (len(lengths) + len(queries)) % 32 == 0
    for filler, total in ((queries, sum(lengths)), (keys, 7 * sum(lengths))):
        assert filler.min() >= 1 and filler.max() <= 128
        assert filled.capacity(total + int(filler.sum())) == total + int(filler.sum())


def test_a_decoder_without_rows_stays_without() -> None:
    _, filled = both(6, task="mlm")
    assert all(len(writing.ids) == len(writing.seen) == 0 for writing in filled.writings.values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_label_of_filler_reaches_no_loss(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, count = torch.randn(9, 5, requires_grad=True), torch.tensor(6.0)
    label = torch.tensor([0, 1, 2, 3, 4, 0, NO_TARGET, NO_TARGET, NO_TARGET])
    total = token_cross_entropy(logits, label, count, smoothing).total
    wanted = F.cross_entropy(logits[:6], label[:6], reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(total, wanted)
    (gradient,) = torch.autograd.grad(total, logits)
    assert (gradient[6:] == 0).all() and (gradient[:6] != 0).any()


def test_it_stands_in_for_its_preparer() -> None:
    preparer = model().preparer()
    filled = pickle.loads(pickle.dumps(Filled(preparer, 1024)))
    assert (filled.tasks, filled.jpeg) == (preparer.tasks, preparer.jpeg)
    again, batch = filled(SAMPLES, plan(6)), Filled(preparer, 1024)(SAMPLES, plan(6))
    assert torch.equal(again.views["encoder"].gather, batch.views["encoder"].gather)
