"""BLIP: three functions of one text network, what each looks at, what it shares, and what tuning turns off."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import FACTS, tokenizer
from shrunken import batch_of, made, rows, sample, small

from opt.config import UserError
from opt.data.record import Sample
from opt.nn.sampling import Sampling
from opt.nn.states import States
from opt.objectives.term import loss
from opt.systems.blip import BLIP, BLIPConfig
from opt.systems.blip.model import Words
from opt.systems.blip.rows import LANGUAGE, WRITING
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Progress, build, compose

SAMPLES = [sample(number) for number in range(6)]
EARLY = Progress(0, 0.0)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
OWN, WRITES = ("self_attention", "self_norm"), ("writing_attention", "writing_norm")


def blip(preset: str = "blip.trimodal", **changes: Any) -> BLIP:
    """Small, in evaluation mode, away from its beginning, so that what it sees changes what it says."""
    torch.manual_seed(0)
    system = build("blip", dataclasses.replace(small(preset), **changes), tokenizer(), FACTS).eval()
    assert isinstance(system, BLIP)
    with torch.no_grad():
        for parameter in system.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return system


def read(system: BLIP, samples: list[Sample]) -> torch.Tensor:
    return system.embed(samples, ["text"])


def judge(system: BLIP, texts: list[Sample], contexts: list[Sample], *names: str) -> torch.Tensor:
    parts = {"text": system.alone(texts, "text"), **{name: system.alone(contexts, name) for name in names}}
    return system.fuse(parts, dict.fromkeys(parts, np.arange(len(texts))))


@torch.no_grad()
def written(system: BLIP, sample_: Sample, ids: list[int]) -> torch.Tensor:
    """Logits of what follows each of `ids`, by the picture, step by step."""
    words, context = Words(system), system.alone([sample_], "image").padded()
    caches = words.start(*context, len(ids))
    return torch.cat([words.step(torch.tensor([number]), place, caches) for place, number in enumerate(ids)])


def test_reader_and_writer_share_exactly_what_is_not_self_attention() -> None:
    """Invariant (o) of the specification: by what each tensor of the stack changes."""
    names = [name for name, _ in blip().network.stack.named_parameters()]
    first = [name for name in names if name.startswith("blocks.0.")]
    assert len(first) == 2 * (6 + 2) + 6 + 2 + 4 + 2
    for name in first:
        if "query.bias" in name or "key_value.bias" in name:
            continue  # a key's bias changes nothing
        outcomes = []
        for change in (0.0, 0.5):
            system = blip()
            with torch.no_grad():
                parameter = system.network.stack.get_parameter(name)
                parameter.add_(change * torch.randn(parameter.shape))
            ids = [system.tokenizer.bos, 8, 9]
            outcomes.append((read(system, SAMPLES[:1]), judge(system, SAMPLES[:1], SAMPLES[:1], "image"),
                             written(system, SAMPLES[0], ids)))
        reads, judges, writes = (not torch.allclose(a, b, **CLOSE) for a, b in zip(*outcomes, strict=True))
        assert reads == (not any(part in name for part in (*WRITES, "cross"))), name
        assert judges == (not any(part in name for part in WRITES)), name
        assert writes == (not any(part in name for part in OWN)), name


@torch.no_grad()
def test_what_is_written_sees_the_past_alone_and_steps_are_the_forward() -> None:
    system = blip("blip.tiny")
    batch = batch_of(system, {number: each for number, each in enumerate(SAMPLES)})
    words = system.network.words(batch.text, batch.views[WRITING], system.tokenizer.bos)
    context = system.encode("image", batch)
    hidden = system.network.onto(words, context, np.arange(6), writing=True).hidden
    logits = system.word_logits(hidden).split(words.lengths.tolist())
    ids = batch.text.ids[batch.views[WRITING].gather].split(words.lengths.tolist())
    order = [next(place for place, each in enumerate(SAMPLES) if each.key == key) for key in batch.keys]
    for place, number in enumerate(order):
        torch.testing.assert_close(written(system, SAMPLES[number], ids[place].tolist()), logits[place], **CLOSE)
        other = [*ids[place].tolist()[:-1], 7]
        torch.testing.assert_close(written(system, SAMPLES[number], other)[:-1], logits[place][:-1], **CLOSE)
    label = batch.targets[LANGUAGE].label.split(words.lengths.tolist())
    assert all(each.tolist() == [*one.tolist()[1:], system.tokenizer.eos] for each, one in zip(label, ids, strict=True))


def test_each_row_is_judged_and_written_by_what_was_drawn_for_it() -> None:
    """A row whose context is its picture learns nothing of its speech, and the other way round."""
    system = blip(contrast_weight=0.0).train()
    batch = batch_of(system, {number: each for number, each in enumerate(SAMPLES)}, turn=2)
    drawn = batch.host["context"]
    assert {tuple(row) for row in drawn.tolist()} == {(True, True), (True, False), (False, True)}
    for place, table in enumerate(("patches", "frames")):
        values = batch.patches.pixels if table == "patches" else batch.frames.features
        seen = values.float().requires_grad_()
        changed = dataclasses.replace(getattr(batch, table), **{"pixels" if place == 0 else "features": seen})
        terms = system(dataclasses.replace(batch, **{table: changed}), EARLY).terms
        (gradient,) = torch.autograd.grad(terms[LANGUAGE].total, seen)
        view = batch.views[("image", "audio")[place]]
        touched = [bool(gradient[entries[1:] - 1].any()) for entries in view.gather.split(view.lengths.tolist())]
        assert touched == drawn[:, place].tolist()


def test_a_text_is_judged_the_same_in_any_company() -> None:
    system = blip()
    together = judge(system, SAMPLES, SAMPLES, "image", "audio")
    order = [4, 2, 0, 5, 1, 3]
    shuffled = [SAMPLES[place] for place in order]
    torch.testing.assert_close(judge(system, shuffled, shuffled, "image", "audio"), together[order], **CLOSE)
    torch.testing.assert_close(judge(system, SAMPLES[3:4], SAMPLES[3:4], "image", "audio"), together[3:4], **CLOSE)
    parts = {name: system.alone(SAMPLES, name) for name in ("text", "image")}
    pairs = {"text": np.array([0, 1, 2, 0]), "image": np.array([3, 3, 1, 0])}
    expected = judge(system, [SAMPLES[n] for n in pairs["text"]], [SAMPLES[n] for n in pairs["image"]], "image")
    torch.testing.assert_close(system.fuse(parts, pairs), expected, **CLOSE)
    assert expected.std() > 1e-3 and system.cosine_weight == 1.0
    logits = system.match_head(system.pooled({name: part.take(pairs[name]) for name, part in parts.items()}))
    torch.testing.assert_close(system.match_probability(parts, pairs), logits.softmax(1)[:, 1], **CLOSE)
    for given in (("text",), ("image", "audio")):
        with pytest.raises(UserError, match="it judges a text by a picture, speech or both"):
            system.pooled({name: system.alone(SAMPLES, name) for name in given})


def test_captions_come_from_pictures_alone_and_transcripts_from_speech_alone() -> None:
    system = blip()
    for name, other in (("image", "audio"), ("audio", "image")):
        texts = system.generate_text(SAMPLES, [name], Sampling(limit=8))
        assert len(set(texts)) > 1
        mixed = [compose(None, **{name: one, other: two})  # type: ignore[arg-type]
                 for one, two in zip(SAMPLES, SAMPLES[::-1], strict=True)]
        assert system.generate_text(mixed, [name], Sampling(limit=8)) == texts
    assert system.generate_text(SAMPLES, ["audio", "image"], Sampling(limit=8)) != texts
    with pytest.raises(UserError, match="it writes from pictures, speech or both"):
        system.generate_text(SAMPLES, ["text"], Sampling())


def test_drawn_captions_are_the_sample_s_own_and_fit_the_positions() -> None:
    system = blip("blip.tiny", prompt="red and")
    drawn = system.generate_text(SAMPLES, ["image"], Sampling(top_p=0.9, limit=200))
    assert system.generate_text(SAMPLES[2:3], ["image"], Sampling(top_p=0.9, limit=200)) == drawn[2:3]
    assert system.generate_text(SAMPLES, ["image"], Sampling(beams=2, limit=6))
    most = system.config.text_positions
    assert max(len(system.tokenizer.encode(text)) for text in drawn) <= most - 2


def test_a_prompt_is_given_and_not_learned() -> None:
    plain, prompted = blip("blip.tiny"), blip("blip.tiny", prompt="red and blue")
    without, batch = (batch_of(system, {0: SAMPLES[0]}) for system in (plain, prompted))
    assert prompted.preparer().start().tolist() == [prompted.tokenizer.bos, *prompted.tokenizer.encode("red and blue")]
    assert batch.views[WRITING].lengths[0] == without.views[WRITING].lengths[0] + 3
    assert batch.targets[LANGUAGE].label.tolist() == without.targets[LANGUAGE].label.tolist()
    assert (batch.targets[LANGUAGE].index - without.targets[LANGUAGE].index).tolist() == [3] * len(
        batch.targets[LANGUAGE].index)
    assert batch.counts[LANGUAGE] == without.counts[LANGUAGE]


@pytest.mark.parametrize(("weights", "still"), [
    ({"contrast_weight": 0.0, "match_weight": 0.0}, ("match_head", "contrast.temperature", "encoders.project")),
    ({"language_weight": 0.0}, ("word_head", "writing_attention", "writing_norm")),
])
def test_weights_of_0_tune_a_captioner_or_a_filter(weights: dict[str, float], still: tuple[str, ...]) -> None:
    system = made("blip.tiny")
    assert isinstance(system, BLIP)
    system.config = dataclasses.replace(system.config, **weights)
    terms = system(batch_of(system), EARLY).terms
    assert set(terms) == {"align_text_image", "match", LANGUAGE}
    loss(terms).backward()
    for name, parameter in system.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert not (any(part in name for part in still) and parameter.grad.any()), name


def test_the_twin_and_the_ring_move_after_a_step_that_was_kept() -> None:
    system = made("blip.tiny").train()
    assert isinstance(system, BLIP)
    twin = system.twin.copy.get_parameter("project.text.linear.weight")
    before, online = twin.clone(), system.encoders.get_parameter("project.text.linear.weight")
    output = system(batch_of(system), EARLY)
    with torch.no_grad():
        online.add_(1.0)
    system.after_step([output.carry], torch.tensor(False))
    assert torch.equal(twin, before) and not system.contrast.ring.has_text.any()
    system.after_step([output.carry], torch.tensor(True))
    torch.testing.assert_close(twin, before.lerp(online, 1 - system.config.momentum))
    assert system.contrast.ring.has_text.any() and system.contrast.ring.has_image.any()


def test_the_twin_s_share_rises_along_the_ramp() -> None:
    config = BLIPConfig(distillation=0.4, ramp=0.1)
    assert [config.alpha(Progress(0, fraction)) for fraction in (0.0, 0.05, 0.1, 0.7)] == [0.0, 0.2, 0.4, 0.4]


def test_questions_are_answered_by_the_state_of_their_first_token_beside_each_picture() -> None:
    answers = ("yes", "no", "red")
    system = made("blip.tiny", tuning=Tuning("nlvr2", answers=answers, pictures=2)).eval()
    assert isinstance(system, BLIP) and system.answer_head is not None
    given = [dataclasses.replace(one, answers=("no",), pictures=(one.pictures[0], two.pictures[0]))
             for one, two in zip(SAMPLES, SAMPLES[::-1], strict=True)]
    output = system(system.preparer()(dict(enumerate(given)), rows(system, dict(enumerate(given)))), EARLY)
    loss(output.terms).backward()
    gradient = system.network.stack.get_parameter("blocks.0.cross_attention.query.weight").grad
    assert output.terms.keys() == {"answer"} and gradient is not None and gradient.any()
    system.after_step([output.carry], torch.tensor(True))
    assert not system.contrast.ring.has_text.any()
    pooled = [system.pooled({"text": system.alone(given, "text"), "image": system.alone(
        [dataclasses.replace(one, pictures=one.pictures[turn : turn + 1]) for one in given], "image")})
        for turn in range(2)]
    best = system.answer_head(torch.cat(pooled, dim=1)).argmax(dim=1)
    assert system.answer(given) == [answers[place] for place in best.tolist()]
    assert system.generate_text(SAMPLES[:1], ["image"], Sampling(limit=3)) is not None


def test_values_out_of_range_are_one_sentence() -> None:
    with pytest.raises(UserError) as error:
        BLIPConfig(smoothing=1.0, ring_rows=0, momentum=1.5, match_weight=-1.0, ramp=0.0)
    for said in ("ring-rows 0", "match-weight -1.0", "momentum 1.5", "ramp 0.0", "smoothing 1.0"):
        assert said in str(error.value)


def test_states_of_words_begin_with_the_token_that_asks_for_judgement() -> None:
    system = blip("blip.tiny")
    words = system.alone(SAMPLES[:2], "text")
    assert isinstance(words, States)
    enc = system.network.embedder.at(torch.tensor([system.tokenizer.enc] * 2), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(words.first, enc)
    features = system.features(SAMPLES[:2], ["text", "image"])
    torch.testing.assert_close(features[1:], system.features(SAMPLES[1:2], ["text", "image"]), **CLOSE)
