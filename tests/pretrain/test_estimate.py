"""What a step is said to cost: operations against a formula by hand, bytes against autograd's own, peaks by name."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import shrunken
import torch
from fixtures import FACTS, fake_sample, tokenizer
from PIL import Image
from torch import nn

from opt.data.capacity import Filled
from opt.data.plan import Plan
from opt.systems.dvae import DVAE, DVAEConfig
from opt.systems.opt import OPT, tiny
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Progress
from opt.systems.vlmo.config import VISION
from pretrain.estimate import (
    _control_groups,
    available,
    listed,
    memory,
    peak,
    state_memory,
    work,
)

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(tiny().model, width=32, layers=2, heads=2, inner=64, decoder_layers=2, alignment_width=8,
                             drop_rate=0.5, dropout=0.1)


def opt(**changes):
    torch.manual_seed(0)
    return OPT(dataclasses.replace(CONFIG, **changes), tokenizer(), FACTS).train()


def rows(system, count=24):
    preparer = system.preparer()
    samples = {number: fake_sample(number) for number in range(count)}
    plan = Plan(0, np.full(count, 10), 10**6, preparer.tasks, np.arange(count, dtype=np.uint64))
    return samples, plan.batch_at(0)


def batch_of(system):
    return system.preparer()(*rows(system))


def by_hand(system, batch):
    """Multiply-adds of OPT's matrix products x 2, forward and backward: sequence by sequence, matrix by matrix."""
    config, facts, view = system.config, system.facts, batch.views["encoder"]
    width, inner, tokens, words = config.width, config.inner, len(view.gather), system.tokenizer.size
    lengths = np.diff([*view.first.tolist(), tokens])
    sums = config.layers * (tokens * (4 * width**2 + 2 * width * inner) + 2 * width * float((lengths**2).sum()))
    for name, outputs in (("text", words), ("codes", facts.codebook)):
        writing = batch.writings[name]
        written = np.diff(writing.layout.query_borders)
        seen = np.diff(writing.context.key_borders)
        pairs = (written**2).sum() + 2 * (written * seen).sum()  # causal, half; two products
        layer = written.sum() * (6 * width**2 + 2 * width * inner) + 2 * len(writing.seen) * width**2 + width * pairs
        sums += config.decoder_layers * layer + written.sum() * width * outputs
    for entries, given in ((batch.regions.masked, facts.region_width + 7), (batch.frames.masked, facts.speech_width)):
        sums += len(entries) * given * width
    mlm, region, frame, match = (len(batch.targets[name].index) for name in ("mlm", "regions", "frames", "match"))
    sums += mlm * width * (width + words) + region * width * (facts.region_width + len(facts.region_classes) + 1)
    sums += frame * width * facts.speech_width + match * width * (width + 5)
    sums += len(batch.extra["contrast_frames"]) * frame * facts.speech_width
    for name in ("align_text_image", "align_text_audio", "align_image_audio"):
        pairs = len(batch.extra[name])
        sums += 2 * pairs * width * config.alignment_width + 2 * pairs**2 * config.alignment_width
    return 3 * 2 * float(sums)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_operations_are_those_of_a_formula_by_hand(bfloat16):
    system = opt()
    batch = batch_of(system)
    found = work(system, batch, bfloat16, CPU)
    assert found.flops == pytest.approx(by_hand(system, batch), rel=1e-6) and found.tokens == batch.tokens


def test_the_system_its_gradients_and_random_numbers_stay_as_they_are():
    system = opt()
    batch, before = batch_of(system), torch.random.get_rng_state()
    state = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    work(system, batch, True, CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in system.state_dict().items())
    assert all(parameter.grad is None for parameter in system.parameters())
    assert not system.encoder.blocks[0].self_attention._forward_hooks
    system(batch, Progress(0, 0.0))  # and still runs on real numbers


def test_shapes_that_depend_on_values_are_counted_by_a_real_forward():
    hard, plain = (opt(tuning=Tuning(f"retrieval-{task}")) for task in ("hard", "in-batch"))
    batch, before = batch_of(hard), torch.random.get_rng_state()
    found, less = work(hard, batch, False, CPU), work(plain, batch_of(plain), False, CPU)
    assert found.flops > 1.3 * less.flops and found.activation_bytes > 1.3 * less.activation_bytes
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.activation_bytes == pytest.approx(saved_by_a_real_step(hard, batch, False), rel=0.02)


def test_what_no_fake_can_do_is_no_news(caplog: pytest.LogCaptureFixture):
    system = shrunken.made("albef.tiny")  # copies its own parts
    assert work(system, shrunken.batch_of(system), False, CPU).flops > 0 and not caplog.records


def test_attention_of_experts_counts_real_pairs_as_all_attention():
    """The same lengths, one expert or several: as many operations, but for what the heads are asked."""
    one, several = (shrunken.made("vlmo.tiny", experts=experts, stage=VISION, positions="absolute")
                    for experts in (False, True))
    found, wanted = (work(each, shrunken.batch_of(each), False, CPU) for each in (several, one))
    view = shrunken.batch_of(one).views["encoder"]
    attention = 3 * 2 * 4 * 16 * view.layout.pairs  # forward and backward, layers, 4 D for each pair
    linear = 3 * 2 * 2 * int(view.lengths.sum()) * (4 * 16 * 16 + 2 * 16 * 32)
    assert found.flops == pytest.approx(wanted.flops, rel=1e-6)
    assert 0.9 * (attention + linear) < found.flops < 1.3 * (attention + linear)


def test_filler_costs_bytes_but_is_no_work():
    system = opt()
    samples, plan = rows(system)
    real, filled = (work(system, prepare(samples, plan), True, CPU)
                    for prepare in (system.preparer(), Filled(system.preparer(), 4096)))
    assert filled.activation_bytes > 1.1 * real.activation_bytes and filled.tokens == real.tokens
    assert filled.flops == pytest.approx(real.flops, rel=0.05)  # a fifth is filler


def saved_by_a_real_step(system, batch, bfloat16):
    """Bytes of all storages that autograd keeps, but for the weights', the batch's and their casts."""
    known = {tensor.untyped_storage().data_ptr() for tensor in system.parameters()}
    known |= {tensor.untyped_storage().data_ptr() for tensor in tensors(batch)}
    sizes = {parameter.shape for parameter in system.parameters()} | {p.T.shape for p in system.parameters()
                                                                      if p.ndim == 2}
    kept = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        cast = tensor.dtype == torch.bfloat16 and tensor.shape in sizes
        if storage.data_ptr() not in known and not cast:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), torch.autocast(
            "cpu", torch.bfloat16, enabled=bfloat16):
        output = system(batch, Progress(0, 0.0))
    assert output.terms
    return sum(storage.nbytes() for storage in kept.values())


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors(entry)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_bytes_kept_for_backward_are_those_of_a_real_step(bfloat16):
    system = opt()
    batch = system.preparer()(*rows(system, 8))
    found, saved = work(system, batch, bfloat16, CPU), saved_by_a_real_step(system, batch, bfloat16)
    assert found.activation_bytes == pytest.approx(saved, rel=0.02 if bfloat16 else 0)  # some have a weight's shape
    linear = sum(module.weight.numel() for module in system.modules() if isinstance(module, nn.Linear))
    assert (found.cast_bytes >= 2 * linear) == bfloat16 and (found.cast_bytes == 0) == (not bfloat16)


def test_convolutions_count_what_runs_without_gradient_once():
    torch.manual_seed(0)
    system = DVAE(DVAEConfig(codebook=16, widths=(8, 8, 8)), None, FACTS).train()
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
    samples, plan = rows(system)
    batch = system.preparer()({number: dataclasses.replace(sample, pictures=(
        dataclasses.replace(sample.pictures[0], jpeg=jpeg.getvalue()),)) for number, sample in samples.items()}, plan)
    sums = {}

    def count(name):
        def hook(module, inputs, output):
            sums[name] = sums.get(name, 0) + 2 * output.numel() * module.weight[0].numel() * (
                3 if torch.is_grad_enabled() else 1)
        return hook

    for name, module in system.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count(name))
    system(batch, Progress(0, 0.0))
    assert work(system, batch, False, CPU).flops == pytest.approx(sum(sums.values()))


def test_frozen_weights_need_no_gradients_and_a_share_under_fsdp():
    system = opt()
    for parameter in system.encoder.parameters():
        parameter.requires_grad_(False)
    every, frozen = (sum(parameter.nbytes for parameter in part.parameters()) for part in (system, system.encoder))
    states = state_memory(system)
    assert (states.weights, states.gradients, states.moments) == (every, every - frozen, 2 * (every - frozen))
    assert state_memory(system, "fsdp", 4).states == pytest.approx(states.states / 4, abs=12)
    assert state_memory(system, "ddp", 4) == states
    found = work(system, batch_of(system), True, CPU)
    needed = memory(system, found, "ddp", 1)
    assert needed.total == states.states + found.cast_bytes + found.activation_bytes + found.batch_bytes


@pytest.mark.parametrize(("name", "figure"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA L4", 121e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165e12),
    ("NVIDIA L40", None), ("Tesla T4", None),
])
def test_gpus_are_told_by_the_words_of_their_names(name, figure):
    assert listed(name) == figure


def test_a_cpu_is_measured_without_disturbing_random_numbers():
    before = torch.random.get_rng_state()
    found = peak(CPU, bfloat16=False)
    assert 1e8 < found.flops_per_second < 1e15 and "float32" in found.source
    assert torch.equal(before, torch.random.get_rng_state())


def test_control_groups_limit_what_is_available(tmp_path: Path):
    own = tmp_path / "own"
    job = tmp_path / "slurm" / "job"
    (job / "step").mkdir(parents=True)
    for folder, most, used, dropped in ((job, "1000", "700", "anon 5\ninactive_file 50\n"), (job / "step", "max", "600",
                                                                                             "")):
        for name, text in (("memory.max", most), ("memory.current", used), ("memory.stat", dropped)):
            (folder / name).write_text(text)
    own.write_text("0::/slurm/job/step\n")
    assert list(_control_groups(tmp_path, own)) == [350]
    group = tmp_path / "memory" / "docker"
    group.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "500"), ("usage_in_bytes", "100"), ("stat", "total_inactive_file 0\n")):
        (group / f"memory.{name}").write_text(text)
    own.write_text("5:cpu:/\n4:memory:/docker\n0::/\n")
    assert list(_control_groups(tmp_path, own)) == [400]
    assert 0 < available(CPU) < 2**50
