"""Compiled blocks: the same numbers, one graph for all blocks of a kind, and none made anew for filled batches."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import varlen
from fixtures import FACTS, fake_sample, tokenizer
from torch._dynamo.testing import CompileCounterWithBackend

from opt.data.batch import Batch
from opt.data.capacity import Filled
from opt.data.layout import cross_layout, self_layout
from opt.data.plan import BatchPlan, row_keys
from opt.nn.block import Block
from opt.nn.compiled import _mark, compile_blocks
from opt.objectives.term import loss
from opt.systems.opt import OPT, OPTConfig
from opt.systems.opt.tasks import TASKS
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Progress

CONFIG = OPTConfig(width=16, layers=3, heads=2, inner=32, decoder_layers=2, dropout=0.0)
SAMPLES = {number: fake_sample(number) for number in range(24)}


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(config: OPTConfig = CONFIG) -> OPT:
    torch.manual_seed(0)
    return OPT(config, tokenizer(), FACTS)


def batch(system: OPT, seed: int, filled: bool) -> Batch:
    numbers = np.random.default_rng(seed).permutation(24)
    partners = np.stack([np.roll(numbers, 1), np.roll(numbers, 2)], axis=1)
    drawn = BatchPlan(numbers, np.arange(24) % len(TASKS), partners, row_keys(seed, 0, numbers), 0, 0, 24)
    preparer = system.preparer()
    return (Filled(preparer, 16_384) if filled else preparer)(SAMPLES, drawn)


def step(system: OPT, prepared: Batch) -> list[torch.Tensor]:
    terms = system(prepared, Progress(0, 0.0)).terms
    loss(terms).backward()
    gradients = [parameter.grad for parameter in system.parameters() if parameter.grad is not None]
    system.zero_grad()
    return [*(term.total.detach() for term in terms.values()), *gradients]


@pytest.mark.parametrize("kernel", ["varlen", "buckets"])
def test_filled_batches_are_compiled_once_and_plain_ones_again_and_again(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = varlen.use(monkeypatch) if kernel == "varlen" else []
    system, compiler = model(), CompileCounterWithBackend("aot_eager")
    compile_blocks(system, compiler)
    step(system, batch(system, 0, filled=True))
    first = compiler.frame_count
    if kernel == "varlen":
        assert first == 2, "one graph for three encoder blocks, one for two blocks of each of two decoders"
        assert len(calls) == 3 + 2 * (2 + 2), "self and cross"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 4):
            step(system, batch(system, seed, filled=True))
    assert compiler.frame_count == first
    step(system, batch(system, 0, filled=False))
    second = compiler.frame_count
    step(system, batch(system, 1, filled=False))
    assert compiler.frame_count > second > first, "sizes of plain batches differ"


def test_the_number_of_sequences_and_their_longest_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens in any number of sequences, that look at contexts of any length, are one graph without a break."""
    varlen.use(monkeypatch)
    block, compiler = Block(16, 2, 32, 0.0, cross=True, causal=True), CompileCounterWithBackend("aot_eager")
    stack = torch.nn.ModuleList([block])
    block.compile(backend=compiler, dynamic=False, fullgraph=True)
    for pairs in ([(20, 7), (44, 9)], [(16, 3), (16, 30), (16, 2), (16, 2)], [(64, 5)]):
        lengths, keys = np.array(pairs).T
        layout = self_layout(lengths)
        context = cross_layout(np.cumsum(lengths) - lengths, lengths, np.cumsum(keys) - keys, keys)
        inputs = (torch.randn(64, 16, requires_grad=True), layout, torch.randn(int(keys.sum()), 16), context)
        _mark(stack, inputs, {})
        output = block(*inputs)
        output.sum().backward()
        torch.testing.assert_close(output, block.forward(*inputs), atol=1e-5, rtol=1e-4)
    assert compiler.frame_count == 1


def test_a_filled_compiled_step_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, compiled = model(), model()
    wanted = step(plain, batch(plain, 3, filled=False))
    varlen.use(monkeypatch)
    compile_blocks(compiled, "aot_eager")
    for first, second in zip(step(compiled, batch(compiled, 3, filled=True)), wanted, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_a_decoder_without_rows_and_evaluation_work_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen.use(monkeypatch)
    system = model()
    compile_blocks(system, "aot_eager")
    numbers = np.arange(8)
    drawn = BatchPlan(numbers, np.zeros(8, np.int64), np.full((8, 2), -1), row_keys(0, 0, numbers), 0, 0, 8)
    prepared = Filled(system.preparer(), 16_384)(SAMPLES, drawn)
    assert all(torch.isfinite(value).all() for value in step(system, prepared))
    with torch.no_grad():
        terms = system.eval()(prepared, Progress(0, 0.0)).terms
    assert torch.isfinite(loss(terms)) and float(terms["dtr"].total) == 0


def test_hard_pairs_come_in_too_many_sizes_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen.use(monkeypatch)
    tuned = dataclasses.replace(CONFIG, alignment_weight=1.0, tuning=Tuning("retrieval-hard"))
    system, compiler = model(tuned), CompileCounterWithBackend("aot_eager")
    compile_blocks(system, compiler)
    frames = []
    for seed in range(4):
        step(system, batch(system, seed, filled=True))
        frames.append(compiler.frame_count)
    assert frames[0] > 0 and frames == frames[:1] * 4
