"""Search against independent computations: all sequences listed, transformers' beam search, probabilities counted."""

import itertools

import numpy as np
import pytest
import torch

from opt.nn import search
from opt.nn.search import beam, best, draw, greedy, length_penalty, pick

END, VOCABULARY, LENGTH = 3, 4, 5


class Recurrent:
    """A random decoder whose state is a vector a row: rows that continue other rows take their state over."""

    def __init__(self, seed: int, samples: int, beams: int = 1, sharpness: float = 2.0) -> None:
        make = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(VOCABULARY + 1, 8, generator=make, dtype=torch.float64)
        self.turn, self.out = (torch.randn(8, n, generator=make, dtype=torch.float64) for n in (8, VOCABULARY))
        self.sharpness = sharpness
        self.first = torch.randn(samples, 8, generator=make, dtype=torch.float64)
        self.state = self.first.repeat_interleave(beams, dim=0)

    def __call__(self, ids: torch.Tensor, position: int, parents: torch.Tensor | None) -> torch.Tensor:
        state = self.state if parents is None else self.state[parents]
        self.state = torch.tanh(state @ self.turn * 0.7 + self.embed[ids])
        return self.state @ self.out * self.sharpness

    def alone(self, sample: int, beams: int) -> "Recurrent":
        self.state = self.first[sample : sample + 1].repeat_interleave(beams, dim=0)
        return self

    def score(self, sample: int, ids: tuple[int, ...], alpha: float) -> float:
        """Log-probability of one sequence over its penalty, computed alone."""
        state, last, total = self.first[sample], VOCABULARY, 0.0
        for token in ids:
            state = torch.tanh(state @ self.turn * 0.7 + self.embed[last])
            total, last = total + (state @ self.out * self.sharpness).log_softmax(-1)[token].item(), token
        return total / ((5 + len(ids)) / 6) ** alpha


def starts(samples: int) -> torch.Tensor:
    return torch.full((samples,), VOCABULARY)


def every_sequence() -> list[tuple[int, ...]]:
    """All that end once, and all of full length that do not."""
    words = range(END)
    ended = [(*words_, END) for n in range(LENGTH) for words_ in itertools.product(words, repeat=n)]
    return ended + list(itertools.product(words, repeat=LENGTH))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 3.0])
def test_a_wide_beam_finds_what_listing_all_sequences_finds(seed: int, alpha: float) -> None:
    beams = VOCABULARY ** (LENGTH - 1)
    found = beam(Recurrent(seed, 3, beams), starts(3), LENGTH, beams, alpha, END, keep=6)
    lengths = set()
    for sample in range(3):
        model = Recurrent(seed, 3)
        listed = sorted(every_sequence(), key=lambda ids, s=sample, m=model: -m.score(s, ids, alpha))[:6]
        padded = [[*ids, *[END] * (LENGTH - len(ids))] for ids in listed]
        assert found.ids[sample].tolist() == padded
        scores = torch.tensor([model.score(sample, ids, alpha) for ids in listed])
        torch.testing.assert_close(found.scores[sample], scores, atol=1e-5, rtol=1e-5)
        lengths |= {len(ids) for ids in listed}
    assert len(lengths) > 1, "ends at different lengths"


@pytest.mark.parametrize("seed", range(20))
def test_one_beam_is_greedy(seed: int) -> None:
    wanted = greedy(Recurrent(seed, 4), starts(4), 9, END)
    assert torch.equal(beam(Recurrent(seed, 4), starts(4), 9, 1, 0.0, END).ids[:, 0], wanted)
    endless = greedy(Recurrent(seed, 4), starts(4), 9)
    assert torch.equal(beam(Recurrent(seed, 4), starts(4), 9, 1, 1.0).ids[:, 0], endless), "codes never end"


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_sample_finds_the_same_alone_and_in_a_batch(alpha: float) -> None:
    """Samples end at different steps: those done early wait for the others unchanged."""
    for seed in range(10):
        together = beam(Recurrent(seed, 6, 3), starts(6), 17, 3, alpha, END, keep=3)
        for sample in range(6):
            alone = beam(Recurrent(seed, 6).alone(sample, 3), starts(1), 17, 3, alpha, END, keep=3)
            assert torch.equal(alone.ids[0], together.ids[sample])
            torch.testing.assert_close(alone.scores[0], together.scores[sample])


def test_the_search_stops_only_when_nothing_can_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking at every token, or never, whether all is over gives the same sequences."""
    for seed in range(10):
        found = []
        for every in (1, 4, 1000):
            monkeypatch.setattr(search, "CHECK_EVERY", every)
            found.append(beam(Recurrent(seed, 5, 3), starts(5), 30, 3, 0.8, END, keep=2))
        assert all(torch.equal(found[0].ids, other.ids) for other in found[1:])
        assert all(torch.equal(found[0].scores, other.scores) for other in found[1:])


def test_the_loop_ends_early() -> None:
    def step(ids: torch.Tensor, position: int, parents: torch.Tensor | None) -> torch.Tensor:
        assert position < search.CHECK_EVERY, "all had ended"
        return torch.tensor([0.0, 0.0, 0.0, 9.0]).expand(len(ids), 4)

    assert (greedy(step, starts(2), 100, END) == END).all()
    assert (beam(step, starts(2), 100, 2, 1.0, END).ids == END).all()


def test_a_longer_text_wins_by_the_penalty() -> None:
    """Ending at once has probability 0.4, three tokens 0.6 x 0.9 x 0.6 = 0.324 in all."""
    table = torch.tensor([[0.6, 0, 0, 0.4], [0.1, 0.9, 0, 0], [0.4, 0, 0, 0.6]]).log()
    found = {
        alpha: beam(lambda ids, place, parents: table[place].expand(len(ids), 4), starts(1), 3, 4, alpha, END)
        for alpha in (0.0, 3.0)
    }
    assert found[0.0].ids[0, 0].tolist() == [END, END, END]
    assert found[3.0].ids[0, 0].tolist() == [0, 1, END]
    assert found[3.0].scores[0, 0].item() == pytest.approx(np.log(0.324) / (8 / 6) ** 3, rel=1e-4)
    assert length_penalty(3, 3.0) == (8 / 6) ** 3 and length_penalty(7, 0.0) == 1


def test_fewer_sequences_than_asked_for_score_minus_infinity() -> None:
    step = lambda ids, position, parents: torch.tensor([0.0, -torch.inf]).expand(len(ids), 2)  # noqa: E731
    found = beam(step, starts(1), 2, 3, 0.0, end=1, keep=3)
    assert found.ids[0, 0].tolist() == [0, 0]
    assert found.scores[0].tolist() == [0.0, -torch.inf, -torch.inf]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beam_search_is_that_of_transformers(alpha: float, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random GPT-2s. Its penalty is length ** alpha; "never" is its exact bound, its default a heuristic."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(search, "length_penalty", lambda length, power: length**power)
    agreed = 0
    for seed in range(4):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=9, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1,
            pad_token_id=1, initializer_range=0.7)).eval()  # fmt: skip
        model.lm_head.weight.data *= 0.3
        first = torch.tensor([[2], [5], [7]])
        theirs = model.generate(
            first, attention_mask=torch.ones_like(first), max_new_tokens=8, do_sample=False, num_beams=beams,
            num_return_sequences=2, early_stopping="never", length_penalty=alpha, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        prefix = [torch.zeros(3 * beams, 0, dtype=torch.long)]

        @torch.inference_mode()
        def step(ids, position, parents, model=model, prefix=prefix):
            past = prefix[0] if parents is None else prefix[0][parents]
            prefix[0] = torch.cat([past, ids[:, None]], dim=1)
            return model(prefix[0]).logits[:, -1]

        ours = beam(step, first.flatten(), 8, beams, alpha, end=1, keep=2)
        ids = torch.nn.functional.pad(theirs.sequences[:, 1:], (0, 9 - theirs.sequences.shape[1]), value=1)
        assert torch.equal(ours.ids.flatten(0, 1), ids)
        torch.testing.assert_close(ours.scores.flatten(), theirs.sequences_scores, atol=1e-5, rtol=1e-4)
        agreed += int((ids == 1).any(dim=1).sum())
    assert agreed > 0, "some sequences ended before the limit"


def test_greedy_takes_the_likeliest_and_stops_at_the_end() -> None:
    table = torch.full((4, 2, 5), -1.0)
    for position, (first, second) in enumerate([(3, 1), (2, 4), (4, 1), (1, 1)]):
        table[position, 0, first] = table[position, 1, second] = 5.0
    ids = greedy(lambda ids, position, parents: table[position], starts(2), 4, end=4)
    assert ids.tolist() == [[3, 2, 4, 4], [1, 4, 4, 4]]


def grid(count: int = 10_000) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("top_k, top_p, shares", [
    (0, 1.0, [0.1, 0.4, 0.2, 0.3]), (3, 1.0, [0, 4 / 9, 2 / 9, 3 / 9]), (0, 0.65, [0, 4 / 7, 0, 3 / 7]),
    (0, 0.75, [0, 4 / 9, 2 / 9, 3 / 9]), (3, 0.75, [0, 4 / 7, 0, 3 / 7]), (0, 0.3, [0, 1, 0, 0]),
    (1, 1.0, [0, 1, 0, 0]),
])  # fmt: skip
def test_draws_follow_the_probabilities_of_what_is_kept(top_k: int, top_p: float, shares: list[float]) -> None:
    """top_k first, then the nucleus of what is left, as in transformers."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 5
    counted = torch.bincount(pick(logits.expand(10_000, 4), grid(), top_k, top_p), minlength=4) / 10_000
    torch.testing.assert_close(counted, torch.tensor(shares, dtype=torch.float32), atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_nucleus_is_the_smallest_set_of_enough_mass(seed: int) -> None:
    probability = torch.randn(12, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(0)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        drawn = pick(probability.log().expand(10_000, 12), grid(), 0, top_p).unique()
        outside = [i for i in range(12) if i not in drawn.tolist()]
        assert probability[drawn].sum() >= top_p - 1e-6
        assert probability[drawn].sum() - probability[drawn].min() < top_p, "without the last it is not enough"
        assert not outside or probability[outside].max() <= probability[drawn].min()


def test_temperature_sharpens_and_draws_are_a_samples_own() -> None:
    uniform = torch.rand(3, 50, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    other = torch.rand(3, 50, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    warm = [draw(Recurrent(0, 3), starts(3), 50, u) for u in (uniform, uniform, other)]
    assert torch.equal(warm[0], warm[1]) and not torch.equal(warm[0], warm[2])
    cold = draw(Recurrent(0, 3), starts(3), 50, uniform, temperature=1e-3)
    assert torch.equal(cold, greedy(Recurrent(0, 3), starts(3), 50))
    for sample in range(3):
        alone = draw(Recurrent(0, 3).alone(sample, 1), starts(1), 50, uniform[sample : sample + 1])
        assert torch.equal(alone[0], warm[0][sample])


def test_equal_scores_go_to_the_first_place() -> None:
    scores = torch.tensor([[1.0, 3.0, -0.0, 3.0, 0.0, -torch.inf, 1.0, -2.0]])
    assert best(scores, 8).tolist() == [[1, 3, 0, 6, 2, 4, 7, 5]]
    random = torch.randn(40, 500, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    assert torch.equal(best(random, 60), random.sort(dim=-1, descending=True, stable=True).indices[:, :60])


@pytest.mark.parametrize("options", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": 0.0}])
def test_bad_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        draw(Recurrent(0, 1), starts(1), 1, torch.zeros(1, 1), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep"):
        beam(Recurrent(0, 1), starts(1), 1, 2, keep=3)
