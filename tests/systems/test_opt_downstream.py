"""Fine-tuning's rows: what a task sees is what it should see, and nothing else; every head keeps a gradient."""

import dataclasses

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_sample, tokenizer

from opt.config import UserError
from opt.data.batch import Batch
from opt.data.plan import BatchPlan, Plan
from opt.data.record import Lengths
from opt.objectives.term import loss
from opt.systems.opt import OPT, tiny
from opt.systems.shared import matching
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Progress, Sampling, compose

SMALL = dataclasses.replace(tiny().model, width=16, layers=1, heads=2, inner=32, decoder_layers=1, alignment_width=8)
ANSWERS = ("yes", "no", "red")
SAMPLES = {n: dataclasses.replace(fake_sample(n), answers=(("yes", "red")[n % 2],)) for n in range(12)}
TASKS = ("captioning", "retrieval-margin", "retrieval-in-batch", "retrieval-hard", "vqa-classes", "vqa-words")


def model(task: str, **tuning: object) -> OPT:
    torch.manual_seed(0)
    return OPT(dataclasses.replace(SMALL, tuning=Tuning(task, answers=ANSWERS, **tuning)), tokenizer(), FACTS)


def batch_of(system: OPT, samples: dict = SAMPLES) -> Batch:
    """The first batch of the system's own plan, all samples in it."""
    rows = system.preparer()
    plan = Plan(0, np.ones(len(samples), np.int64), 100, rows.tasks, np.arange(len(samples), dtype=np.uint64), 1)
    return rows(samples, plan.batch_at(0))


def sequences(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Entries of text, regions and frames of each sequence of the view."""
    view, words, regions = batch.views["encoder"], len(batch.text.ids), len(batch.regions.masked)
    ends = [*view.first.tolist()[1:], len(view.gather)]
    pieces = [view.gather[start:end].tolist() for start, end in zip(view.first.tolist(), ends, strict=True)]
    return [([e for e in piece if e < words], [e - words for e in piece if words <= e < words + regions],
             [e - words - regions for e in piece if e >= words + regions]) for piece in pieces]


def key_of_picture(batch: Batch, regions: list[int], samples: dict = SAMPLES) -> int:
    """The sample whose picture these regions are."""
    features = batch.regions.features[regions].numpy().astype(np.float16)
    return next(n for n, sample in samples.items() if np.array_equal(sample.pictures[0].regions, features))


def words_of(batch: Batch, text: list[int]) -> str:
    return tokenizer().decode(batch.text.ids[text].tolist())


@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_has_a_gradient_and_nothing_is_masked(task: str) -> None:
    system, batch = model(task), batch_of(model(task))
    terms = system(batch, Progress(0, 0.0)).terms
    aligned = {"align_text_image", "align_text_audio", "align_image_audio"}
    trained = {"captioning": {"dtr"}, "retrieval-margin": {"ranking"}, "vqa-classes": {"answer"}, "vqa-words": {"dtr"},
               "retrieval-in-batch": aligned, "retrieval-hard": aligned | {"hard"}}[task]
    assert {name for name, term in terms.items() if term.count > 0} == trained
    loss(terms).backward()
    assert not [name for name, parameter in system.named_parameters() if parameter.grad is None]
    assert not batch.regions.masked.any() and not batch.frames.masked.any()
    assert not (batch.text.ids == tokenizer().mask).any()


@pytest.mark.parametrize("given", [("image",), ("audio",), ("image", "audio")])
def test_a_caption_is_written_from_what_inference_sees(given: tuple[str, ...]) -> None:
    """The whole batch holds nothing but [CLS] and what is given: what is written stands in the decoder alone."""
    system = model("captioning", given=given)
    batch = batch_of(system)
    assert (batch.text.ids == tokenizer().cls).all()
    assert bool(len(batch.regions.masked)) == ("image" in given)
    assert bool(len(batch.frames.masked)) == ("audio" in given)
    inference = system.preparer().inputs([SAMPLES[int(key.removeprefix("sample"))] for key in batch.keys], given)
    trained = system.eval().encode(batch)[0]
    torch.testing.assert_close(trained, system.encode(inference)[0])
    ends = np.flatnonzero(batch.writings["text"].label.numpy() == tokenizer().eos) + 1
    written = [tokenizer().decode(ids) for ids in np.split(batch.writings["text"].label.numpy(), ends)[:-1]]
    assert written == [SAMPLES[int(key.removeprefix("sample"))].caption for key in batch.keys]


def test_false_pairs_are_of_really_other_pictures() -> None:
    batch = batch_of(model("retrieval-margin"))
    sequence, captions = sequences(batch), {n: sample.caption for n, sample in SAMPLES.items()}
    assert len(batch.extra["ranked"]) == len(SAMPLES) and batch.counts["ranked"] == 2 * len(SAMPLES)
    for key, row in zip(batch.keys, batch.extra["ranked"].tolist(), strict=True):
        own = int(key.removeprefix("sample"))
        (true_text, true, _), (same_text, other_picture, _), (other_text, same_picture, _) = (sequence[n] for n in row)
        assert words_of(batch, true_text) == words_of(batch, same_text) == captions[own]
        assert key_of_picture(batch, true) == key_of_picture(batch, same_picture) == own
        assert key_of_picture(batch, other_picture) != own
        assert words_of(batch, other_text) in {caption for n, caption in captions.items() if n != own}


def test_a_batch_of_two_pictures_has_no_false_pairs_and_does_not_fail() -> None:
    system = model("retrieval-margin")
    one = BatchPlan(np.arange(2), np.zeros(2, np.int64), np.full((2, 2), -1), np.arange(2, dtype=np.uint64), 0, 0, 2)
    terms = system(system.preparer()(SAMPLES, one), Progress(0, 0.0)).terms
    assert loss(terms).item() == 0.0


def test_in_batch_holds_each_modality_alone() -> None:
    batch = batch_of(model("retrieval-in-batch"))
    for text, regions, frames in sequences(batch):
        assert [len(text) > 1, bool(regions), bool(frames)].count(True) == 1
    assert len(sequences(batch)) == 3 * len(SAMPLES)


def test_questions_are_asked_of_text_and_picture_alone() -> None:
    for task in ("vqa-classes", "vqa-words"):
        batch = batch_of(model(task))
        assert not len(batch.frames.masked)
        for key, (text, regions, _) in zip(batch.keys, sequences(batch), strict=True):
            own = int(key.removeprefix("sample"))
            assert words_of(batch, text) == SAMPLES[own].caption and key_of_picture(batch, regions) == own


@pytest.mark.parametrize(("answers", "scores"), [
    (("red",), {2: 1.0}),
    (("red", "red", "yes"), {2: 0.6, 0: 0.3}),
    (("no",) * 4 + ("yes",) * 5 + ("blue",), {1: 1.0, 0: 1.0}),
    (("no",) * 3, {1: 0.9}),
    (("blue",), {}),
])
def test_soft_targets_by_hand(answers: tuple[str, ...], scores: dict[int, float]) -> None:
    system = model("vqa-classes")
    assert system.config.tuning.scores(answers) == pytest.approx(scores)
    samples = {0: dataclasses.replace(SAMPLES[0], answers=answers)}
    batch = batch_of(system, samples)
    logits = system.eval().answer_head(system.pooler(system.encode(batch)[1]))
    target = torch.tensor([[scores.get(place, 0.0) for place in range(3)]])
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    assert system(batch, Progress(0, 0.0)).terms["answer"].total.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_words_come_from_each_annotator_in_turn() -> None:
    """Which annotator's answer is written is drawn by the row's key."""
    rows = model("vqa-words").preparer()
    sample = {0: dataclasses.replace(SAMPLES[0], answers=("red", "red", "blue"))}
    drawn = []
    for key in range(60):
        one = BatchPlan(np.zeros(1, np.int64), np.zeros(1, np.int64), np.full((1, 2), -1),
                        np.array([key], np.uint64), 0, 0, 1)
        drawn.append(tokenizer().decode(rows(sample, one).writings["text"].label.tolist()))
    assert set(drawn) == {"red", "blue"} and drawn.count("red") > 30


def test_costs_count_the_tokens_of_a_batch() -> None:
    sizes = Lengths(*(np.array([f(sample) for sample in SAMPLES.values()]) for f in (
        lambda s: len(s.caption.split()), lambda s: len(s.pictures[0].regions), lambda s: len(s.speech))))
    for task in TASKS:
        system = model(task)
        cost, tokens = system.preparer().cost(sizes).sum(), batch_of(system).tokens
        if task == "retrieval-hard":  # pairs that are put together on the way
            tokens += 3 * int((sizes.words + 2 + sizes.regions).sum())
        assert cost == pytest.approx(tokens, rel=0.25), task


def test_only_a_model_tuned_for_questions_answers_them() -> None:
    samples = [SAMPLES[n] for n in range(4)]
    assert set(model("vqa-classes").eval().answer(samples)) <= set(ANSWERS)
    assert len(model("vqa-words").eval().answer(samples)) == 4
    with pytest.raises(UserError, match="opt finetune"):
        model("captioning").answer(samples)


def test_a_tuned_model_still_does_the_rest() -> None:
    system, samples = model("vqa-classes").eval(), [SAMPLES[n] for n in range(3)]
    assert system.embed(samples, ["text"]).shape == (3, 8)
    assert system.score(samples, ["text", "image"]).shape == (3,)
    assert system.generate_codes(samples, ["text"], Sampling()).shape == (3, 8, 8)


def test_hard_pairs_are_the_wrong_ones_that_the_alignment_likes_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same pairs put together as samples and scored one by one."""
    def likeliest(scores: torch.Tensor, wrong: torch.Tensor, *keys: object) -> tuple[torch.Tensor, torch.Tensor]:
        return scores.masked_fill(~wrong, -1e9).argmax(1), wrong.any(1)

    monkeypatch.setattr(matching, "draw_negatives", likeliest)
    samples = {**SAMPLES, 3: dataclasses.replace(SAMPLES[3], key="sample2")}  # two tellings of one picture
    system = model("retrieval-hard").eval()
    batch = batch_of(system, samples)
    asked = [samples[int(number)] for number in _plan_order(system, samples)]
    text, image = system.embed(asked, ["text"]), system.embed(asked, ["image"])
    wrong = torch.tensor([[one.key != two.key for two in asked] for one in asked])
    scores = (text @ image.T).masked_fill(~wrong, -1e9)
    images, texts = scores.argmax(1).tolist(), scores.argmax(0).tolist()
    pairs = [*zip(asked, asked, strict=True), *((one, asked[i]) for one, i in zip(asked, images, strict=True)),
             *((asked[i], one) for one, i in zip(asked, texts, strict=True))]
    logits = system.score([compose(text=one, image=two) for one, two in pairs], ["text", "image"])
    target = torch.tensor([1.0] * len(asked) + [0.0] * (2 * len(asked)))
    term = system(batch, Progress(0, 0.0)).terms["hard"]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    torch.testing.assert_close(term.total, expected / 3, rtol=1e-4, atol=1e-4)
    assert term.count == len(asked)


def _plan_order(system: OPT, samples: dict) -> np.ndarray:
    tasks, keys = system.preparer().tasks, np.arange(len(samples), dtype=np.uint64)
    return Plan(0, np.ones(len(samples), np.int64), 100, tasks, keys, 1).batch_at(0).sample


def test_a_batch_of_one_picture_has_no_wrong_pairs() -> None:
    system = model("retrieval-hard").eval()
    samples = {n: dataclasses.replace(SAMPLES[n], key="same") for n in range(3)}
    term = system(batch_of(system, samples), Progress(0, 0.0)).terms["hard"]
    assert term.count == 3 and torch.isfinite(term.total)
    silent = {n: dataclasses.replace(SAMPLES[n], pictures=()) for n in range(3)}
    assert loss(system(batch_of(system, silent), Progress(0, 0.0)).terms).isfinite()
