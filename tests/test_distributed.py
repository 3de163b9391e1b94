"""Several processes against one, and several micro-batches against one: the same losses and gradients, by every
objective, with the same rows.
"""

import dataclasses
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fixtures import FACTS, fake_sample, tokenizer
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from training import Job

from opt.data.batch import Batch
from opt.data.plan import BatchPlan, row_keys, split
from opt.data.record import Sample
from opt.distributed import exchange_tokens, gather_rows, interleaved, sum_over_ranks, sum_with_gradient
from opt.nn.heads import Temperature
from opt.objectives.contrastive import momentum_contrast
from opt.objectives.matching import draw_negatives
from opt.objectives.term import loss
from opt.systems.dvae import DVAE, DVAEConfig
from opt.systems.opt import OPT, OPTConfig
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Progress, System
from pretrain.parallel import processes

ROWS = 12
MASKED = {"mlm", "mvfr", "mrc", "mafr", "mac", "dtr", "dir", "match"}
ALIGNED = {"align_text_image", "align_text_audio", "align_image_audio"}
EVEN = ["mlm", "mlm", "mvm", "mvm", "mam", "mam", "dtr", "dtr", "dir", "dir", "match", "match"]
UNEVEN = ["mlm", "match", "mlm", "mam", "mlm", "mam", "mvm", "mam", "match", "match", "dtr", "mlm"]
"""Tasks of rows, which go by turns to the first and the second process."""


@dataclass(frozen=True)
class Case:
    """What is computed: a system, the tasks of its rows, and the samples they show."""

    system: Callable[[], System]
    terms: set[str]
    tasks: tuple[str, ...] = ()
    lacks: Callable[[int], tuple[str, ...]] = lambda number: ("speech",) * (number % 5 == 4) + ("regions",) * (
        number % 7 == 6)
    numbers: tuple[int, ...] = tuple(range(ROWS))
    contrast: bool = True
    """Whether something is compared within a micro-batch, so that micro-batches do not add up to one."""


def opt(mixing: str = "rows", task: str = "pretraining", aligned: bool = True) -> OPT:
    torch.manual_seed(0)
    tuning = Tuning(task, answers=("yes", "no", "red") if task == "vqa-classes" else ())
    system = OPT(OPTConfig(
        width=16, layers=2, heads=2, inner=32, decoder_layers=1, dropout=0.0, mixing=mixing, label_smoothing=0.1,
        alignment_weight=float(aligned), alignment_width=8, tuning=tuning,
    ), tokenizer(), FACTS)
    for parameter in system.parameters():
        parameter.data *= 10 if parameter.ndim > 1 else 1  # where everything looks alike, gradients are rounding errors
    return system


def image_tokenizer(divergence: str) -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(codebook=16, widths=(8, 8, 16), divergence=divergence), None, FACTS)


def of_the_second(*parts: str) -> Callable[[int], tuple[str, ...]]:
    """Every other sample, all of them rows of the second process, lacks these parts."""
    return lambda number: parts * (number % 2)


def of_all(*parts: str) -> Callable[[int], tuple[str, ...]]:
    return lambda number: parts


PRETRAINING = {
    "even": Case(opt, MASKED | ALIGNED, tuple(EVEN)),
    "uneven": Case(opt, MASKED | ALIGNED, tuple(UNEVEN)),
    "without alignment": Case(lambda: opt(aligned=False), MASKED, tuple(UNEVEN), contrast=False),
    "steps": Case(lambda: opt("steps"), MASKED | ALIGNED, ("dtr",) * ROWS),
    "joint": Case(lambda: opt("joint"), MASKED | ALIGNED, ("joint",) * ROWS),
    "joint without alignment": Case(lambda: opt("joint", aligned=False), MASKED, ("joint",) * ROWS, contrast=False),
    "some have nothing to match": Case(opt, MASKED | ALIGNED, tuple(UNEVEN), of_the_second("regions", "speech")),
    "some have no words": Case(opt, MASKED | ALIGNED, ("match", "mlm") * 6, of_the_second("caption")),
    "some have nothing": Case(opt, MASKED | ALIGNED, tuple(EVEN), of_the_second("caption", "regions", "speech")),
    "pairs": Case(opt, MASKED | ALIGNED, tuple(EVEN), of_all("speech")),
    "text": Case(opt, MASKED | ALIGNED, tuple(EVEN), of_all("speech", "regions")),
    "pictures": Case(opt, MASKED | ALIGNED, tuple(EVEN), of_all("speech", "caption")),
    "recordings": Case(lambda: opt("joint"), MASKED | ALIGNED, ("joint",) * ROWS, of_all("regions", "caption")),
    "samples twice": Case(opt, MASKED | ALIGNED, tuple(UNEVEN), numbers=(0, 1, 2, 3, 0, 5, 6, 7, 8, 2, 10, 1)),
}
WHOLE = of_all()
FINE_TUNING = {
    name: Case(lambda name=name: opt(task=name), MASKED | ALIGNED | extra, (name,) * ROWS, WHOLE,
               contrast=name == "retrieval-in-batch")
    for name, extra in {"captioning": set(), "retrieval-in-batch": set(), "retrieval-margin": {"ranking"},
                        "vqa-classes": {"answer"}, "vqa-words": set()}.items()
}
TOKENIZERS = {
    f"codes used evenly by {kind}": Case(lambda kind=kind: image_tokenizer(kind), {
        "reconstruction", "divergence", "error_of_codes", "codes_used"
    }, ("draw",) * 8, WHOLE, tuple(range(8)), contrast=kind == "usage")
    for kind in ("usage", "place")
}
CASES = PRETRAINING | FINE_TUNING | TOKENIZERS


@cache
def sample(number: int, lacks: tuple[str, ...]) -> Sample:
    """With an answer to its caption, and a picture of noise for the image tokenizer."""
    made = fake_sample(number, **{part: part not in lacks for part in ("regions", "caption", "speech")})
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(256, size=(64, 64, 3), dtype=np.uint8)).save(content, "PNG")
    with Image.open(content) as picture:
        picture.convert("RGB").save(jpeg := io.BytesIO(), "JPEG")
    pictures = tuple(dataclasses.replace(picture, jpeg=jpeg.getvalue()) for picture in made.pictures)
    return dataclasses.replace(made, pictures=pictures, answers=(("yes", "red")[number % 2],))


def plan_of(case: Case, system: System) -> BatchPlan:
    """The global batch: partners are two other pictures of it."""
    names, numbers = system.preparer().tasks.names, np.array(case.numbers)
    others = [[other for other in sorted(set(case.numbers)) if other != number] for number in case.numbers]
    partners = np.array([[other[row % len(other)], other[(row + 1) % len(other)]] for row, other in enumerate(others)])
    task = np.array([names.index(task) for task in case.tasks])
    return BatchPlan(numbers, task, partners, row_keys(7, 0, np.arange(len(numbers))), 0, 0, len(numbers))


def batch_of(case: Case, system: System, plan: BatchPlan) -> Batch:
    samples = {number: sample(number, case.lacks(number)) for number in range(ROWS)}
    return system.preparer()(samples, plan)


def step(case: Case, rank: int = 0, world: int = 1, micros: int = 1) -> dict[str, Tensor]:
    """Losses by term and gradients by parameter of one step of one process: its shares."""
    system = case.system().train()
    plan = plan_of(case, system)
    batches = [batch_of(case, system, split(plan, rank, world, micro, micros)) for micro in range(micros)]
    counts = sum_over_ranks({name: sum(batch.counts[name] for batch in batches) for name in batches[0].counts})
    results = {f"loss {name}": torch.zeros(()) for name in sorted(case.terms)}
    for batch in batches:
        with same_noise(system):
            terms = system(dataclasses.replace(batch, counts=counts), Progress(0, 0.0)).terms
        assert terms.keys() == case.terms and all(term.total.shape == () for term in terms.values())
        loss(terms).backward()
        for name, term in terms.items():
            results[f"loss {name}"] += term.mean().detach()
    results |= {name: parameter.grad for name, parameter in system.named_parameters()}
    assert all(result is not None for result in results.values())
    return results


@contextmanager
def same_noise(system: System) -> Iterator[None]:
    """The Gumbel noise of a picture is its own, whoever shares its batch."""
    keys: list[str] = []

    def remember(module: System, inputs: tuple) -> None:
        keys[:] = inputs[0].keys

    def softmax(logits: Tensor, tau: float, dim: int) -> Tensor:
        noise = [np.random.default_rng(zlib.crc32(key.encode())).gumbel(size=logits.shape[1:]) for key in keys]
        return ((logits + torch.from_numpy(np.stack(noise)).float()) / tau).softmax(dim)

    with patch("torch.nn.functional.gumbel_softmax", softmax), system.register_forward_pre_hook(remember):
        yield


def gathering(rank: int, world: int) -> dict[str, Tensor]:
    """Uneven rows gathered, and their gradient of a loss that each rank weighs in its own way."""
    rows = (10.0 * rank + torch.arange(2.0 * (rank + 1)).reshape(-1, 2)).requires_grad_()
    gathered = gather_rows(rows, 3)
    weight = torch.arange(1.0, 1 + gathered.numel()).reshape(gathered.shape) * (rank + 1)
    (gathered * weight).sum().backward()
    summed = sum_with_gradient(rows.detach().sum().requires_grad_())
    numbers = gather_rows(torch.arange(rank + 1), 3, filler=-1)
    return {f"{rank} gathered": gathered.detach(), f"{rank} gradient": rows.grad, f"{rank} summed": summed.detach(),
            f"{rank} numbers": numbers}


LENGTHS = {"uneven": ((2, 0, 3), (1, 1, 4)), "one has none": ((0, 0), (2, 1)), "none": ((0,), (0,))}
"""Tokens of the sequences of the first and of the second process."""
ASKED = {"uneven": ((5, 0, 0, 2, 3), (4, 2)), "one has none": ((3, 1, 2), ()), "none": ((0, 1), (1,))}
"""Which of both processes' sequences each of them asks for."""


def sequences(rank: int, name: str) -> tuple[Tensor, np.ndarray]:
    lengths = np.array(LENGTHS[name][rank])
    return (torch.arange(3.0 * lengths.sum()).reshape(-1, 3) + 100 * rank).requires_grad_(), lengths


def judged(hidden: Tensor, rank: int) -> Tensor:
    """A loss of one process, which weighs every token in its own way."""
    return (hidden * (1 + torch.arange(hidden.numel()).reshape(hidden.shape)) ** (1 + rank)).sum()


def exchanging(rank: int) -> dict[str, Tensor]:
    """Sequences asked for, and the gradient of the sum of both ranks' losses."""
    results = {}
    for name in LENGTHS:
        own, lengths = sequences(rank, name)
        taken, taken_lengths = exchange_tokens(own, lengths, np.array(ASKED[name][rank], np.int64))
        judged(taken, rank).backward()
        results |= {f"{name} tokens": taken.detach(), f"{name} gradient": own.grad,
                    f"{name} lengths": torch.from_numpy(taken_lengths)}
    return results


def momentum(rank: int, world: int) -> dict[str, Tensor]:
    """The share of one process: a contrast with the keys of all and a ring's, and wrong candidates for its rows."""
    torch.manual_seed(0)
    ring, own = 5, slice(rank, None, world)
    vectors = torch.nn.functional.normalize(torch.randn(4, 8 + ring, 4), dim=-1)
    there, picture = torch.rand(2, 8 + ring) < 0.7, torch.arange(8 + ring) // 2
    key = torch.from_numpy(row_keys(0, 0, np.arange(8)).view(np.int64))

    def keys(whole: Tensor) -> Tensor:
        """The batch's in its order, as gathered from all processes, then the ring's."""
        return torch.cat([interleaved(gather_rows(whole[:8][own], 8 // world), world), whole[8:]])

    first, second = (vectors[number, :8][own].clone().requires_grad_() for number in range(2))
    scale = torch.tensor([5.0], requires_grad=True)
    term = momentum_contrast(
        first, second, vectors[2, :8][own], vectors[3, :8][own], keys(vectors[2]), keys(vectors[3]),
        (there[0] & there[1])[:8][own], keys(there[0].int()).bool(), keys(there[1].int()).bool(), picture[:8][own],
        keys(picture), scale, 0.4, torch.tensor(8.0),
    )
    term.total.backward()
    candidates = keys(vectors[3])[:8]
    drawn, _ = draw_negatives(5 * first @ candidates.T, picture[:8][own][:, None] != keys(picture)[:8], key[own],
                              interleaved(gather_rows(key[own], 8 // world), world))
    return {"total": term.total.detach(), "scale": scale.grad, "first": first.grad, "second": second.grad,
            "drawn": drawn}


def sharded_temperature() -> Tensor:
    """A scale out of range, sharded over the processes, clamped."""
    temperature = Temperature()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    scale = torch.nn.Parameter(distribute_tensor(torch.tensor([99.0]), mesh))
    temperature.log_scale = scale
    temperature.clamp()
    assert isinstance(temperature.log_scale, DTensor)
    return temperature.log_scale.full_tensor().detach()


def compute_all(folder: Path) -> None:
    """What each of two processes does."""
    with processes():
        own = dist.get_rank()
        for name, case in CASES.items():
            for micros in (1, 2):
                results = step(case, own, 2, micros)
                for result in results.values():
                    dist.all_reduce(result)
                if own == 0:
                    torch.save(results, folder / f"{name}, {micros}.pt")
        clamped = sharded_temperature()
        results = {**gathering(own, 2), **exchanging(own), **momentum(own, 2), "clamped": clamped}
        torch.save(results, folder / f"rank {own}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes computed, summed over both, by case and micro-batches."""
    folder = tmp_path_factory.mktemp("two")
    assert Job(2, compute_all, folder).wait() == [0, 0]
    return folder


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to rounding: within 1e-5 of the largest gradient of the same parameter."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * largest + 1e-7,
                                   msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two: Path, case: str, micros: int) -> None:
    require_same(torch.load(two / f"{case}, {micros}.pt", weights_only=True), step(CASES[case], micros=micros))


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.contrast])
def test_two_micro_batches_equal_one(case: str) -> None:
    require_same(step(CASES[case], micros=2), step(CASES[case]))


def test_the_cases_are_what_they_say() -> None:
    """Halves with other counts, halves without any, and a loss in every term that a case trains."""
    for name in ("uneven", "some have nothing to match", "some have nothing"):
        case = CASES[name]
        system = case.system()
        first, second = (batch_of(case, system, split(plan_of(case, system), rank, 2)).counts for rank in range(2))
        assert any((first[count] == 0) != (second[count] == 0) for count in first), name
    for name, trained in {"even": MASKED | ALIGNED, "joint": MASKED | ALIGNED, "retrieval-margin": {"ranking"},
                          "retrieval-in-batch": ALIGNED, "vqa-classes": {"answer"}, "captioning": {"dtr"}}.items():
        results = step(CASES[name])
        assert all(results[f"loss {term}"] > 0 for term in trained), name


def test_rows_of_all_ranks_stand_at_known_places_and_their_gradient_comes_from_all(two: Path) -> None:
    results = [torch.load(two / f"rank {rank}.pt", weights_only=True) for rank in range(2)]
    wanted = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [10.0, 11.0], [12.0, 13.0], [0.0, 0.0]])
    gradient = 3 * torch.arange(1.0, 13.0).reshape(6, 2)  # weights 1, 2, ... once by the first and twice by the second
    for rank, own in ((0, slice(0, 1)), (1, slice(3, 5))):
        torch.testing.assert_close(results[rank][f"{rank} gathered"], wanted)
        torch.testing.assert_close(results[rank][f"{rank} gradient"], gradient[own])
        assert results[rank][f"{rank} numbers"].tolist() == [0, -1, -1, 0, 1, -1]
        assert results[rank][f"{rank} summed"] == 1 + 46


@pytest.mark.parametrize("name", LENGTHS)
def test_sequences_come_from_all_ranks_as_asked_for_and_their_gradient_from_all_who_asked(two: Path, name: str) -> None:
    whole = torch.cat([sequences(rank, name)[0].detach() for rank in range(2)]).requires_grad_()
    lengths = LENGTHS[name][0] + LENGTHS[name][1]
    pieces = whole.split(list(lengths))
    taken = [torch.cat([whole[:0], *(pieces[row] for row in ASKED[name][rank])]) for rank in range(2)]
    sum(judged(tokens, rank) for rank, tokens in enumerate(taken)).backward()
    begin = 0
    for rank in range(2):
        results = torch.load(two / f"rank {rank}.pt", weights_only=True)
        assert torch.equal(results[f"{name} tokens"], taken[rank])
        assert results[f"{name} lengths"].tolist() == [lengths[row] for row in ASKED[name][rank]]
        own = results[f"{name} gradient"]
        torch.testing.assert_close(own, whole.grad[begin : begin + len(own)])
        begin += len(own)
    assert begin == len(whole)


def test_contrast_with_a_twin_and_negatives_are_those_of_one_process(two: Path) -> None:
    whole = momentum(0, 1)
    shares = [torch.load(two / f"rank {rank}.pt", weights_only=True) for rank in range(2)]
    for name in ("total", "scale"):
        torch.testing.assert_close(shares[0][name] + shares[1][name], whole[name])
    for name in ("first", "second", "drawn"):
        torch.testing.assert_close(interleaved(torch.cat([share[name] for share in shares]), 2), whole[name])


def test_rows_of_ranks_and_micro_batches_come_back_in_the_order_of_the_batch() -> None:
    plan = BatchPlan(*(np.arange(12),) * 2, np.zeros((12, 2), np.int64), row_keys(0, 0, np.arange(12)), 0, 0, 12)
    micros = [interleaved(torch.cat([torch.from_numpy(split(plan, rank, 2, micro, 3).sample) for rank in range(2)]), 2)
              for micro in range(3)]
    assert interleaved(torch.cat(micros), 3).tolist() == list(range(12))
    assert interleaved(torch.arange(6).reshape(6, 1), 1).flatten().tolist() == list(range(6))
    assert interleaved(torch.zeros(0, 4), 2).shape == (0, 4)


def test_a_temperature_shared_among_processes_is_clamped(two: Path) -> None:
    assert torch.load(two / "rank 1.pt", weights_only=True)["clamped"].tolist() == [pytest.approx(np.log(100))]


def test_alone_everything_is_itself() -> None:
    counts = {"mlm": torch.tensor(3.0), "match": torch.tensor(0.0)}
    rows = torch.ones(2, 3)
    assert sum_over_ranks(counts) is counts
    assert gather_rows(rows, 5) is rows and sum_with_gradient(rows) is rows
    taken, lengths = exchange_tokens(rows, np.array([1, 1]), np.array([1, 0, 1]))
    assert torch.equal(taken, rows[[1, 0, 1]]) and lengths.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="2 rows exceed the capacity of 1"):
        gather_rows(rows, 1)

