"""Edits and what is learned of them, against plain loops."""

import pytest
import torch

from opt.objectives.correction import averaged, correction, detection, draw_edits
from opt.objectives.term import Term, loss

PLACES, WORDS = 4000, 12


def drawn(logits: torch.Tensor, original: torch.Tensor, closed: tuple[int, ...] = (), candidates: int = 20
          ) -> torch.Tensor:
    """With keys of their own for all places."""
    key = torch.randint(2**62, (len(original),), generator=torch.Generator().manual_seed(3))
    opened = torch.ones(logits.shape[1], dtype=torch.bool)
    opened[list(closed)] = False
    return draw_edits(logits, original, opened, key, candidates)


def test_a_word_is_never_edited_to_itself_or_to_one_that_is_shut() -> None:
    torch.manual_seed(0)
    original = torch.arange(PLACES) % WORDS
    found = drawn(torch.randn(PLACES, WORDS), original, closed=(0, 5))
    assert not (found == original).any() and set(found.tolist()) == {*range(WORDS)} - {0, 5}


def test_edits_follow_the_softmax_over_the_likeliest() -> None:
    torch.manual_seed(0)
    logits = torch.randn(WORDS)
    found = drawn(logits.expand(PLACES, -1), torch.full((PLACES,), 2), closed=(7,), candidates=4)
    likeliest = [word for word in logits.argsort(descending=True).tolist() if word not in (2, 7)][:4]
    shares = found.bincount(minlength=WORDS) / PLACES
    torch.testing.assert_close(shares[likeliest], logits[likeliest].softmax(0), rtol=0, atol=0.03)
    assert shares[likeliest].sum() == 1


def test_what_is_drawn_for_a_place_is_up_to_its_key() -> None:
    torch.manual_seed(0)
    logits, original, key = torch.randn(50, WORDS), torch.zeros(50, dtype=torch.int64), torch.arange(50)
    opened = torch.ones(WORDS, dtype=torch.bool)
    order = torch.randperm(50)
    whole = draw_edits(logits, original, opened, key)
    assert torch.equal(draw_edits(logits[order[:20]], original[:20], opened, key[order[:20]]), whole[order[:20]])
    assert not torch.equal(draw_edits(logits, original, opened, key + 1), whole)
    assert len(draw_edits(logits[:0], original[:0], opened, key[:0])) == 0


def test_detection_is_the_sum_over_all_words_by_the_number_of_wrong_ones() -> None:
    torch.manual_seed(0)
    logits, wrong = torch.randn(9, 2), torch.tensor([0, 0, 1, 0, 1, 0, 0, 0, 0]).bool()
    expected = -sum(logits[place].log_softmax(0)[0 if wrong[place] else 1] for place in range(9)) / 2
    torch.testing.assert_close(detection(logits, wrong, torch.tensor(2.0)).mean(), expected)


def test_correction_is_the_surprise_at_wrong_words_alone() -> None:
    torch.manual_seed(0)
    logits, original, wrong = torch.randn(5, WORDS), torch.tensor([3, 1, 4, 1, 5]), torch.tensor([1, 0, 1, 1, 0]).bool()
    expected = -sum(logits[place].log_softmax(0)[original[place]] for place in (0, 2, 3)) / 3
    torch.testing.assert_close(correction(logits, original, wrong, torch.tensor(3.0)).mean(), expected)


@pytest.mark.parametrize("rows", [0, 4])
def test_without_a_wrong_word_nothing_is_learned(rows: int) -> None:
    """Be it that there are no texts, or that none was edited."""
    logits = torch.randn(rows, 2, requires_grad=True)
    words = torch.randn(0, WORDS, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    terms = {"detect": detection(logits, torch.zeros(rows, dtype=torch.bool), torch.tensor(0.0)),
             "correct": correction(words, none, none.bool(), torch.tensor(0.0))}
    loss(terms).backward()
    assert loss(terms) == 0 and not logits.grad.any() and words.grad is not None


def test_two_views_are_averaged() -> None:
    count = torch.tensor(4.0)
    found = averaged(Term(torch.tensor(2.0), count, 0.8), Term(torch.tensor(6.0), count, 0.8))
    assert found.total == 4 and found.mean() == 1 and found.weight == 0.8
