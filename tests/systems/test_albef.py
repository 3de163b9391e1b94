"""ALBEF's own promises: what is hidden and paired, what the twin does and when, and what re-ranking is."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures import FACTS, tokenizer
from shrunken import ROWS, batch_of, lacking, made, rows, sample

from opt.config import UserError
from opt.data.batch import Batch
from opt.data.plan import BatchPlan
from opt.data.record import Lengths, Sample
from opt.nn.states import States
from opt.objectives.term import loss
from opt.systems import albef
from opt.systems.albef import ALBEF, ALBEFConfig, base
from opt.systems.shared.matching import Pairing, usable
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Output, Progress, compose

EXACT = {"rtol": 0, "atol": 1e-5}
LATE = Progress(90, 0.9)
SAMPLES = {number: lacking(number) for number in range(ROWS)}


def moved_twin(system: ALBEF) -> ALBEF:
    """With a twin that believes something else than the model."""
    torch.manual_seed(5)
    with torch.no_grad():
        for value in system.kept.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return system


def drawn(system: ALBEF, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[Output, Pairing, torch.Tensor]:
    """What a forward gives, the pairs that it drew, and the scale they were drawn by."""
    seen = []

    def pair_up(contrast: object, batch: Batch, scale: torch.Tensor) -> Pairing:
        seen.append((real(contrast, batch, scale), scale))
        return seen[-1][0]

    real = albef.pair_up
    monkeypatch.setattr(albef, "pair_up", pair_up)
    output = system(batch, LATE)
    monkeypatch.undo()
    return output, *seen[0]


def texts(batch: Batch) -> list[np.ndarray]:
    """Ids of all sequences of the view "text"."""
    view = batch.views["text"]
    return [ids.numpy() for ids in batch.text.ids[view.gather].split(view.lengths.tolist())]


def reordered(plan: BatchPlan, order: np.ndarray) -> BatchPlan:
    return dataclasses.replace(plan, sample=plan.sample[order], task=plan.task[order], partners=plan.partners[order],
                               key=plan.key[order])


@pytest.mark.parametrize("preset", ["albef.tiny", "albef.trimodal"])
def test_the_order_of_rows_changes_nothing(preset: str) -> None:
    system = moved_twin(made(preset))
    plan, preparer = rows(system, SAMPLES), system.preparer()
    order = np.random.default_rng(0).permutation(len(plan.sample))
    expected, found = (system(preparer(SAMPLES, each), LATE).terms for each in (plan, reordered(plan, order)))
    for name, term in expected.items():
        torch.testing.assert_close(found[name].total, term.total, rtol=1e-5, atol=1e-5)
        assert term.total > 0 and found[name].count == term.count


def test_text_layers_then_fusion_layers_are_all_layers_in_one_run() -> None:
    system = made("albef.tiny")
    batch, encoders = batch_of(system), system.encoders
    text, image = (encoders.encode(name, batch) for name in ("text", "image"))
    looked_at = np.arange(len(text)) % len(image)
    fused = encoders.fuse(text, image, looked_at)
    tower = encoders.towers["text"]
    hidden, layout = tower.entries(batch.text, batch.views["text"]), text.layout
    looks = albef.onto(text.lengths, image.lengths, hidden.device, looked_at)
    for block in [*tower.stack.blocks, *encoders.fusion.blocks]:
        hidden = block(hidden, layout, image.hidden, looks)
    assert torch.equal(hidden, fused.hidden)


def test_hidden_words_stand_behind_all_texts_and_only_where_something_is_looked_at() -> None:
    system = made("albef.trimodal", token_rate=0.5)
    batch = batch_of(system, {number: sample(number, image=number % 4 > 0, speech=number % 2 > 0,
                                             caption=number % 5 > 0) for number in range(ROWS)})
    own = usable(batch)
    ids, whole = texts(batch), batch.host["rows"][own, 0]
    masked = ids[-int(own.sum()):]
    assert 0 < own.sum() < (batch.host["rows"][:, 0] >= 0).sum() and len(ids) == whole.max() + 1 + own.sum()
    target = batch.targets["mlm"]
    originals = np.concatenate([ids[number] for number in whole])
    hidden = np.zeros(len(originals), bool)
    hidden[target.index.numpy()] = True
    shown = np.concatenate(masked)
    assert np.array_equal(originals[hidden], target.label.numpy())
    assert np.array_equal(shown[~hidden], originals[~hidden])
    changed = shown[hidden] == tokenizer().mask
    assert 0.5 < changed.mean() < 1
    assert not np.isin(originals[hidden], [tokenizer().cls, tokenizer().sep]).any()
    assert batch.counts["mlm"] == hidden.sum() and batch.counts["match"] == own.sum()


@pytest.mark.parametrize("preset", ["albef.tiny", "albef.trimodal"])
def test_without_distillation_targets_are_the_words_alone(preset: str) -> None:
    """At alpha 0, be it by the setting or before the ramp, masked words have plain cross entropy."""
    never, ramped = (moved_twin(made(preset, distillation=share)).eval() for share in (0.0, 0.4))
    batch = batch_of(never)
    expected, found = never(batch, LATE).terms, ramped(batch, Progress(0, 0.0)).terms
    for name, term in expected.items():
        assert torch.equal(found[name].total, term.total)
    states = {name: never.encode(name, batch) for name in never.modalities}
    own = np.flatnonzero(usable(batch))
    _, hidden, context = albef._sequences(states, batch)
    target = batch.targets["mlm"]
    logits = never.encoders.words(never.encoders.fuse(hidden, context, own).hidden[target.index])
    torch.testing.assert_close(expected["mlm"].total, F.cross_entropy(logits, target.label, reduction="sum"))
    for name, term in ramped(batch, LATE).terms.items():
        assert torch.equal(term.total, expected[name].total) == (name == "match")


def test_alpha_ramps() -> None:
    config = ALBEFConfig(distillation=0.4, ramp=0.1)
    assert [round(config.alpha(Progress(0, fraction)), 6) for fraction in (0, 0.05, 0.1, 1)] == [0, 0.2, 0.4, 0.4]


def test_nothing_is_matched_with_its_own_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    system = made("albef.tiny")
    keys = {number: dataclasses.replace(sample(number), key=f"picture{number // 3}") for number in range(ROWS)}
    batch = batch_of(system, keys)
    _, pairs, _ = drawn(system, batch, monkeypatch)
    assert len(pairs.text) == 3 * ROWS
    wrong = slice(pairs.true, None)
    assert all(batch.keys[text] != batch.keys[context]
               for text, context in zip(pairs.text[wrong], pairs.context[wrong], strict=True))
    assert np.array_equal(pairs.text[: ROWS], pairs.context[: ROWS])


def test_samples_of_one_picture_have_nothing_to_be_told_from(monkeypatch: pytest.MonkeyPatch) -> None:
    system = made("albef.tiny")
    batch = batch_of(system, {number: dataclasses.replace(sample(number), key="same") for number in range(4)})
    output, pairs, _ = drawn(system, batch, monkeypatch)
    assert len(pairs.text) == pairs.true == 4 and loss(output.terms).isfinite()


def test_random_negatives_are_drawn_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for negatives in ("hard", "random"):
        system = made("albef.tiny", negatives=negatives)
        _, _, scale = drawn(system, batch_of(system), monkeypatch)
        assert torch.equal(scale, system.contrast.temperature() * (negatives == "hard"))


def test_the_twin_moves_after_a_kept_step_and_never_else() -> None:
    system = moved_twin(made("albef.tiny"))
    before = {name: value.clone() for name, value in system.kept.state_dict().items()}
    place = system.contrast.ring.place.clone()

    def same() -> bool:
        return all(torch.equal(value, before[name]) for name, value in system.kept.state_dict().items())

    output = system(batch_of(system), LATE)
    loss(output.terms).backward()
    assert same() and torch.equal(system.contrast.ring.place, place)
    assert all(value.grad is None and not value.requires_grad for value in system.twin.parameters())
    system.after_step([output.carry], torch.tensor(False))
    assert same() and torch.equal(system.contrast.ring.place, place)
    system.after_step([output.carry], torch.tensor(True))
    assert not same() and int(system.contrast.ring.place) == ROWS
    share = system.config.momentum
    for name, value in system.encoders.named_parameters():
        torch.testing.assert_close(system.kept.get_parameter(name), share * before[name] + (1 - share) * value)


def test_the_temperature_is_kept_in_its_range() -> None:
    system = made("albef.tiny")
    output = system(batch_of(system), LATE)
    for wild, kept in ((1e9, 1000.0), (1e-9, 2.0)):
        system.contrast.temperature.log_scale.data.fill_(np.log(wild))
        system.after_step([output.carry], torch.tensor(True))
        assert system.contrast.temperature().item() == pytest.approx(kept, rel=1e-5)


def matched(system: ALBEF, names: tuple[str, ...]) -> tuple[list[Sample], dict[str, States]]:
    samples = [sample(number) for number in range(5)]
    return samples, {name: system.alone(samples, name) for name in names}


@pytest.mark.parametrize("sought", [("image",), ("audio",), ("image", "audio")])
def test_all_pairs_by_kept_states_are_all_pairs_one_by_one(sought: tuple[str, ...]) -> None:
    """What re-ranking does with k = all is the full fusion."""
    system = made("albef.trimodal").eval()
    samples, parts = matched(system, ("text", *sought))
    text, other = (each.ravel() for each in np.indices((5, 5)))
    found = system.fuse(parts, {"text": text, **dict.fromkeys(sought, other)})
    composed = [compose(text=samples[a], **dict.fromkeys(sought, samples[b])) for a, b in zip(text, other, strict=True)]
    torch.testing.assert_close(found, system.score(composed, ["text", *sought]), **EXACT)
    assert found.shape == (25,) and found.std() > 0
    pairs = {name: part.take(other if name != "text" else text) for name, part in parts.items()}
    torch.testing.assert_close(system.match_head(system.pooled(pairs))[:, 1], found, **EXACT)


def test_picture_and_speech_may_come_from_two_samples() -> None:
    system = made("albef.trimodal").eval()
    samples, parts = matched(system, ("text", "image", "audio"))
    given = {"text": np.array([0, 0, 1]), "image": np.array([2, 2, 2]), "audio": np.array([3, 4, 3])}
    composed = [compose(samples[a], samples[b], samples[c]) for a, b, c in zip(*given.values(), strict=True)]
    torch.testing.assert_close(system.fuse(parts, given), system.score(composed, list(given)), **EXACT)


def test_only_a_text_is_matched() -> None:
    system = made("albef.trimodal")
    _, parts = matched(system, ("text", "image", "audio"))
    for names in (("image", "audio"), ("text",)):
        with pytest.raises(UserError, match="matches a text with a picture, speech or both"):
            system.fuse({name: parts[name] for name in names}, dict.fromkeys(names, np.arange(5)))
    with pytest.raises(UserError, match="not audio: pretrain albef.trimodal"):
        made("albef.tiny").alone([sample(0)], "audio")


@pytest.mark.parametrize("task", ["vqa-classes", "nlvr2"])
def test_questions_are_answered_by_the_pooled_state_beside_each_picture(task: str) -> None:
    count, answers = 2 if task == "nlvr2" else 1, ("yes", "no", "red")
    system = made("albef.tiny", tuning=Tuning(task, answers=answers, pictures=count)).eval()
    given = {number: dataclasses.replace(sample(number), answers=("no",), pictures=tuple(
        sample(number + turn).pictures[0] for turn in range(count))) for number in range(6)}
    output = system(system.preparer()(given, rows(system, given)), LATE)
    loss(output.terms).backward()
    assert output.terms.keys() == {"answer"}
    assert system.encoders.fusion.blocks[0].cross_attention.query.weight.grad.any()
    before = {name: value.clone() for name, value in system.state_dict().items()}
    system.after_step([output.carry], torch.tensor(True))
    assert all(torch.equal(value, before[name]) for name, value in system.state_dict().items())
    questions = list(given.values())
    words = system.alone(questions, "text")
    pooled = [system.pooled({"text": words, "image": system.alone([dataclasses.replace(
        one, pictures=one.pictures[turn : turn + 1]) for one in questions], "image")}) for turn in range(count)]
    best = system.answer_head(torch.cat(pooled, dim=1)).argmax(dim=1)
    assert system.answer(questions) == [answers[place] for place in best.tolist()]


def test_speech_of_another_width_is_widened() -> None:
    config = dataclasses.replace(made("albef.trimodal").config, audio=dataclasses.replace(
        made("albef.trimodal").config.audio, width=8))
    system = ALBEF(config, tokenizer(), FACTS)
    assert system.alone([sample(0)], "audio").hidden.shape[1] == config.image.width
    loss(system(batch_of(system), LATE).terms).backward()
    assert system.encoders.widen.weight.grad is not None


@pytest.mark.parametrize("preset", ["albef.tiny", "albef.trimodal"])
def test_cost_is_the_tokens_of_a_batch(preset: str) -> None:
    system = made(preset)
    lengths = Lengths(*(np.array([count(each) for each in SAMPLES.values()]) for count in (
        lambda each: len((each.caption or "").split()), lambda each: 0,
        lambda each: 0 if each.speech is None else len(each.speech), lambda each: 0, lambda each: len(each.pictures))))
    assert system.preparer().cost(lengths).sum() == batch_of(system).tokens


def test_settings_out_of_range_are_named_together() -> None:
    with pytest.raises(UserError, match=r"momentum 1.5 must be from 0 to 1; distillation -1 .*; ramp 0 must be above"):
        ALBEFConfig(momentum=1.5, distillation=-1, ramp=0)


def test_the_published_size() -> None:
    """The authors count 123.7 million for BERT and 85.8 for the ViT (section 4)."""
    with torch.device("meta"):
        system = albef.Encoders(base().model, 30_522, 0)
    sizes = {name: sum(each.numel() for each in module.parameters()) for name, module in (
        ("bert", torch.nn.ModuleList([system.towers["text"], system.fusion, system.word_head])),
        ("vit", system.towers["image"]))}
    assert sizes["vit"] == pytest.approx(85.8e6, rel=0.01)
    assert sizes["bert"] == pytest.approx(123.7e6, rel=0.01)
