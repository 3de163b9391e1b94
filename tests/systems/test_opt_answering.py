"""Answers about two pictures and answers ranked: what is read, what is learned, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_sample, tokenizer

from opt.config import UserError
from opt.data.batch import Batch
from opt.data.plan import BatchPlan, Plan
from opt.data.questions import TRUTHS
from opt.data.record import Lengths, Sample
from opt.nn import ranking
from opt.objectives.term import loss
from opt.systems.opt import OPT, tiny
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Progress

SMALL = dataclasses.replace(tiny().model, width=32, layers=2, heads=2, inner=64, decoder_layers=1, alignment_width=8)


def model(task: str, answers: tuple[str, ...] = TRUTHS) -> OPT:
    torch.manual_seed(0)
    tuning = Tuning(task, answers=answers, pictures=2 if task == "nlvr2" else 1)
    return OPT(dataclasses.replace(SMALL, tuning=tuning), tokenizer(), FACTS)


def pair(left: int, right: int, answer: str = "true") -> Sample:
    """The words of the left sample, both pictures."""
    first, second = fake_sample(left), fake_sample(right)
    pictures = first.pictures + second.pictures
    return dataclasses.replace(first, pictures=pictures, speech=None, answers=(answer,))


PAIRS = {n: pair(n, (5 * n + 1) % 12, TRUTHS[n % 2]) for n in range(12)}
ASKED = [dataclasses.replace(fake_sample(n), speech=None, answers=("red star",)) for n in range(6)]


def batch_of(system: OPT, samples: dict[int, Sample]) -> Batch:
    rows = system.preparer()
    plan = Plan(0, np.ones(len(samples), np.int64), 100, rows.tasks, np.arange(len(samples), dtype=np.uint64), 1)
    return rows(samples, plan.batch_at(0))


# ---- two pictures ---------------------------------------------------------------------------------------------------


def test_the_sentence_stands_beside_each_picture_by_itself() -> None:
    batch = batch_of(model("nlvr2"), PAIRS)
    view, words = batch.views["encoder"], len(batch.text.ids)
    pieces = np.split(view.gather.numpy(), view.first.numpy()[1:])
    assert len(pieces) == 2 * len(PAIRS) and not len(batch.frames.masked) and not batch.regions.masked.any()
    assert batch.targets["answer"].index.tolist() == view.first.reshape(-1, 2).tolist()
    for row, key in enumerate(batch.keys):
        sample = PAIRS[int(key.removeprefix("sample"))]
        for piece, picture in zip(pieces[2 * row : 2 * row + 2], sample.pictures, strict=True):
            assert tokenizer().decode(batch.text.ids[piece[piece < words]].tolist()) == sample.caption
            assert np.array_equal(batch.regions.features[piece[piece >= words] - words].numpy(), picture.regions)
        label = batch.targets["answer"].label
        assert label[label[:, 0] == row, 1].tolist() == [TRUTHS.index(sample.answers[0])]


def test_every_parameter_has_a_gradient_and_the_answer_alone_is_trained() -> None:
    system = model("nlvr2")
    terms = system(batch_of(system, PAIRS), Progress(0, 0.0)).terms
    assert {name for name, term in terms.items() if term.count > 0} == {"answer"}
    loss(terms).backward()
    assert not [name for name, parameter in system.named_parameters() if parameter.grad is None]


def test_the_cost_is_that_of_the_batch() -> None:
    sizes = Lengths(*(np.array([size(sample) for sample in PAIRS.values()]) for size in (
        lambda s: len(s.caption.split()), lambda s: sum(len(each.regions) for each in s.pictures), lambda s: 0)))
    rows = model("nlvr2").preparer()
    assert rows.cost(sizes).sum() == batch_of(model("nlvr2"), PAIRS).tokens


def test_it_learns_twelve_statements_by_heart() -> None:
    system, asked = model("nlvr2"), list(PAIRS.values())
    optimizer = torch.optim.Adam(system.parameters(), 2e-3)
    batch = batch_of(system, PAIRS)
    for _ in range(60):
        optimizer.zero_grad()
        loss(system(batch, Progress(0, 0.0)).terms).backward()
        optimizer.step()
    assert system.eval().answer(asked) == [sample.answers[0] for sample in asked]
    assert system.answer(asked[3:4]) == [asked[3].answers[0]]


def test_who_shares_a_batch_changes_nothing_and_sides_matter() -> None:
    system, asked = model("nlvr2").eval(), list(PAIRS.values())

    def read(samples: list[Sample]) -> torch.Tensor:
        first_SD = system.encode(system.preparer().questions(samples))[1]
        return system.answer_head(system.pooler(first_SD).view(len(samples), -1))

    with torch.no_grad():
        together = read(asked)
        torch.testing.assert_close(torch.cat([read([sample]) for sample in asked]), together, atol=1e-5, rtol=1e-5)
        swapped = [dataclasses.replace(sample, pictures=sample.pictures[::-1]) for sample in asked]
        assert (read(swapped) - together).abs().max() > 1e-4
        assert system.answer(asked) == [TRUTHS[place] for place in together.argmax(1)]


@pytest.mark.parametrize(("task", "sample"), [("nlvr2", ASKED[0]), ("vqa-classes", PAIRS[0]), ("vqa-words", PAIRS[0])])
def test_a_question_about_another_number_of_pictures_is_refused(task: str, sample: Sample) -> None:
    system = model(task)
    with pytest.raises(UserError, match=r"answers questions about \d picture.*opt finetune nlvr2"):
        system.eval().answer([sample])
    one = BatchPlan(np.zeros(1, np.int64), np.zeros(1, np.int64), np.full((1, 2), -1), np.arange(1, dtype=np.uint64),
                    0, 0, 1)  # fmt: skip
    with pytest.raises(UserError, match="sample0"):
        system.preparer()({0: sample}, one)


def test_a_picture_without_regions_is_refused_when_asked_about() -> None:
    blank = dataclasses.replace(PAIRS[0].pictures[0], regions=None, boxes=None, classes=None, scores=None)
    with pytest.raises(UserError, match="has no regions"):
        model("nlvr2").answer([dataclasses.replace(PAIRS[0], pictures=(PAIRS[0].pictures[0], blank))])


# ---- ranking ---------------------------------------------------------------------------------------------------

CANDIDATES = ("red", "red star", "star", "a green circle", "blue", "square and the star", "green", "circle")


def likelihood(system: OPT, sample: Sample, answer: str) -> float:
    """By training's own loss: the sum over the answer's tokens and its end."""
    batch = batch_of(system, {0: dataclasses.replace(sample, answers=(answer,))})
    return -system(batch, Progress(0, 0.0)).terms["dtr"].total.item()


@pytest.mark.parametrize("logits", [1 << 24, 1])
def test_a_candidates_likelihood_is_that_of_trainings_loss(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "LOGITS", logits)  # all at once, or one at a time
    system = model("vqa-words").eval()
    with torch.no_grad():
        wanted = np.array([[likelihood(system, sample, each) for each in CANDIDATES] for sample in ASKED])
    best = [CANDIDATES[place] for place in wanted.argmax(1)]
    assert system.answer(ASKED, CANDIDATES) == best and len(set(best)) >= 1
    assert [system.answer([sample], CANDIDATES)[0] for sample in ASKED] == best
    backwards = system.answer(ASKED, CANDIDATES[::-1])
    assert backwards == best
    found = {}
    original = ranking.likelihoods
    monkeypatch.setattr(ranking, "likelihoods", lambda *given: found.setdefault("BK", original(*given)))
    system.answer(ASKED, CANDIDATES)
    np.testing.assert_allclose(found["BK"].numpy(), wanted, atol=1e-4)


def test_the_shortlist_holds_the_likeliest_first_tokens() -> None:
    system = model("vqa-words").eval()
    first = {each: tokenizer().encode(each)[0] for each in CANDIDATES}
    with torch.no_grad():
        for sample in ASKED:
            batch = batch_of(system, {0: dataclasses.replace(sample, answers=("red",))})
            hidden_ND, _ = system.encode(batch)
            writing, table = batch.writings["text"], system.text.token.weight
            hidden_MD = system.text_decoder(writing.ids, writing.positions, writing.layout,
                                            hidden_ND[writing.seen], writing.context, table)  # fmt: skip
            logits = system.text_decoder.logits(hidden_MD, table)[0]
            order = sorted(CANDIDATES, key=lambda each: -logits[first[each]].item())  # stable
            for size in (1, 3, 5):
                kept = [each for each in CANDIDATES if each in order[:size]]
                best = max(kept, key=lambda each: likelihood(system, sample, each))
                assert system.answer([sample], CANDIDATES, size) == [best]
    assert system.answer(ASKED, CANDIDATES, 99) == system.answer(ASKED, CANDIDATES)


def test_only_a_model_tuned_for_words_ranks() -> None:
    with pytest.raises(UserError, match="from its own list of 2, vqa-words ranks"):
        model("vqa-classes").answer(ASKED, CANDIDATES)
    with pytest.raises(UserError, match="opt finetune"):
        model("captioning").answer(ASKED, CANDIDATES)
    assert model("vqa-words").answering == "written by the decoder, greedy decoding"
    assert model("vqa-classes").answering == "classified among 2 answers"
