"""The sides of benchmarks/train_step.py and clip_step.py do the same: equal weights give equal states and losses."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_sample, tokenizer

from opt.data.batch import Batch
from opt.data.plan import Plan, split
from opt.systems.opt import OPT, OPTConfig
from opt.systems.system import Progress
from opt.weights.bert import ENCODER

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
baselines = importlib.import_module("baselines")
clip_model = importlib.import_module("clip_model")

CONFIG = OPTConfig(width=32, layers=2, heads=4, inner=64, decoder_layers=1, dropout=0.0, post_norm=True,
                   alignment_weight=1.0, alignment_width=16, drop_rate=1.0)
SAMPLES = {number: fake_sample(number) for number in range(24)}


def batches(mixing: str, count: int, apart: bool = False) -> list[Batch]:
    """Batches of all samples; apart: of one row each."""
    preparer = OPT(dataclasses.replace(CONFIG, mixing=mixing), tokenizer(), FACTS).preparer()
    plan = Plan(0, np.ones(len(SAMPLES), np.int64), len(SAMPLES), preparer.tasks,
                np.arange(len(SAMPLES), dtype=np.uint64))
    rows = [plan.batch_at(len(SAMPLES) * number) for number in range(count)]
    if apart:
        rows = [split(row, number, len(row)) for row in rows for number in range(len(row))]
    return [preparer(SAMPLES, row) for row in rows]


@pytest.fixture(scope="module")
def ours() -> OPT:
    torch.manual_seed(0)
    return OPT(CONFIG, tokenizer(), FACTS).eval()


def padded(ours: OPT, everywhere: bool) -> torch.nn.Module:
    """The baseline with the embedders, encoder and heads of ours; the same decoders each time."""
    torch.manual_seed(1)
    theirs = baselines.Padded(CONFIG, tokenizer(), FACTS, everywhere).eval()
    state, blocks = ours.state_dict(), theirs.bert.encoder.layer
    theirs.load_state_dict({name: value for name, value in state.items() if name in theirs.state_dict()}, strict=False)
    for number, block in enumerate(blocks):
        for mine, others in ENCODER.items():
            for kind in ("weight", "bias"):
                pieces = state[f"encoder.blocks.{number}.{mine}.{kind}"].chunk(len(others))
                for name, piece in zip(others, pieces, strict=True):
                    block.get_submodule(name).get_parameter(kind).data.copy_(piece)
    return theirs


def totals(model: torch.nn.Module, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(term.total) for name, term in model(batch, Progress(0, 0.0)).terms.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_bert_on_padded_rows_says_what_our_packed_model_says(ours: OPT, everywhere: bool, attention: str) -> None:
    theirs = padded(ours, everywhere).use(attention)
    (batch,) = batches("rows", 1)
    regrouped = baselines.regroup(batch, padded=True)
    expected, found = totals(ours, batch), totals(theirs, regrouped)
    shared = [name for name in expected if name not in ("dtr", "dir")]
    assert {"mlm", "mrc", "mac", "match", "align_text_audio"} <= set(shared)
    assert [found[name] for name in shared] == pytest.approx([expected[name] for name in shared], rel=1e-4)
    with torch.no_grad():
        assert torch.allclose(theirs.encode(regrouped)[1], ours.encode(batch)[1], atol=1e-5)


def test_padding_changes_no_loss_of_the_baseline(ours: OPT) -> None:
    theirs = padded(ours, everywhere=True)
    whole = totals(theirs, baselines.regroup(batches("rows", 1)[0], padded=True))
    alone = [totals(theirs, baselines.regroup(row, padded=True)) for row in batches("rows", 1, apart=True)]
    for name in ("mlm", "mvfr", "mrc", "mafr", "mac", "match", "dtr", "dir"):
        assert sum(terms.get(name, 0.0) for terms in alone) == pytest.approx(whole[name], rel=1e-4), name


def test_logits_everywhere_and_at_targets_give_one_loss(ours: OPT) -> None:
    everywhere, at_targets = padded(ours, everywhere=True), padded(ours, everywhere=False)
    for batch in batches("steps", 6):
        regrouped = baselines.regroup(batch, padded=True)
        assert totals(everywhere, regrouped) == pytest.approx(totals(at_targets, regrouped), rel=1e-4)


def test_four_runs_of_our_blocks_say_what_one_says(ours: OPT) -> None:
    runs = baselines.Runs(CONFIG, tokenizer(), FACTS).eval()
    runs.load_state_dict(ours.state_dict())
    (batch,) = batches("rows", 1)
    assert totals(runs, baselines.regroup(batch, padded=False)) == pytest.approx(totals(ours, batch), rel=1e-4)


def test_a_baseline_sees_the_real_tokens_that_are_counted() -> None:
    for batch in batches("steps", 6) + batches("rows", 1):
        regrouped = baselines.regroup(batch, padded=True)
        encoded = sum(int(regrouped.extra[f"{kind}_valid"].sum()) for kind in ("fused", "text", "image", "audio"))
        written = sum(int((regrouped.extra[f"{name}_label"] >= 0).sum()) for name in ("text", "codes"))
        twice = sum(len(view.gather) for name, view in baselines.regroup(batch, padded=False).views.items()
                    if name != "encoder") - len(batch.views["encoder"].gather)
        assert encoded + written - twice == batch.tokens
        assert 0 <= twice <= sum(len(writing.seen) for writing in batch.writings.values())
        for writing in regrouped.writings.values():  # decoders look at rows of the fused run alone
            assert len(writing.seen) == 0 or int(writing.seen.max()) < regrouped.extra["fused_valid"].numel()


def test_our_clip_with_the_weights_of_open_clip_has_its_loss() -> None:
    package = importlib.import_module("open_clip")
    torch.manual_seed(0)
    theirs = package.CLIP(16, {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2},
                          {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2})
    ours = clip_model.CLIP(clip_model.Tower(64, 2, 1), clip_model.Tower(32, 2, 2), 32, 16, 50, 12, 16)
    clip_model.take_over(ours, theirs)
    rng, pixels = np.random.default_rng(0), torch.randn(5, 3, 32, 32)
    captions = [np.append(rng.integers(1, 49, length), 49) for length in (3, 11, 5, 1, 7)]
    words_BL = torch.stack([torch.from_numpy(np.pad(caption, (0, 12 - len(caption)))) for caption in captions])
    loss, expected = ours.loss(clip_model.pack(pixels, captions, 16)), package.ClipLoss()(*theirs(pixels, words_BL))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.patches.weight.grad, theirs.visual.conv1.weight.grad.flatten(1), rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours.word.weight.grad, theirs.token_embedding.weight.grad, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
