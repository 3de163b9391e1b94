"""Momentum contrast and matching as systems share them: the ring in the order of the plan, negatives of all ranks, and
two processes that find what one finds."""

from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import Job

from opt.data.batch import Batch
from opt.data.pack import Packer
from opt.data.plan import BatchPlan, split
from opt.distributed import rank, sum_over_ranks, world
from opt.nn.states import ABSENT
from opt.objectives.term import loss
from opt.systems.shared.matching import pair_up, usable
from opt.systems.shared.momentum import Contrasted, MomentumContrast
from opt.systems.system import MODALITIES
from pretrain.parallel import processes

ROWS, SPACE, RING = 16, 6, 20
PICTURES = np.arange(ROWS) // 3 * 7 + 100
"""Three rows in a row show one picture."""
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def vectors(seed: int) -> dict[str, Tensor]:
    """Of every row, in every modality."""
    torch.manual_seed(seed)
    return {name: F.normalize(torch.randn(ROWS, SPACE), dim=-1) for name in MODALITIES}


def has(name: str) -> np.ndarray:
    """Which rows have the modality: all have another pattern, and one row has nothing but a text."""
    rows = np.arange(ROWS)
    return {"text": rows % 5 != 4, "image": (rows % 4 != 3) & (rows != 6), "audio": (rows % 3 != 1) & (rows != 6)}[name]


def part(micro: int = 0, micros: int = 1) -> np.ndarray:
    """Rows of the global batch that this process has in a micro-batch."""
    rows = np.arange(ROWS)
    plan = BatchPlan(rows, 0 * rows, np.full((ROWS, 2), -1), rows.astype(np.uint64), 0, 0, ROWS)
    return split(plan, rank(), world(), micro, micros).sample


def batch_of(rows: np.ndarray) -> Batch:
    """A batch of those rows, of which nothing is there but numbers."""
    numbers = np.stack([np.where(has(name)[rows], np.cumsum(has(name)[rows]) - 1, ABSENT) for name in MODALITIES], 1)
    context = np.stack([has("image") & (np.arange(ROWS) % 2 < 1), has("audio")], axis=1)[rows]
    counts = {f"align_{a}_{b}": int((has(a) & has(b))[rows].sum())
              for a, b in (("text", "image"), ("text", "audio"), ("image", "audio"))}
    counts["match"] = int((has("text")[rows] & context.any(axis=1)).sum())
    extra = {"picture": torch.from_numpy(PICTURES[rows]), "row_key": torch.from_numpy(rows * 1_000_003 + 5)}
    host = {"rows": numbers, "context": context}
    return Packer(1, 1).batch([str(row) for row in rows], {}, extra, counts, (), host)


def contrasted(contrast: MomentumContrast, rows: np.ndarray, seed: int, alpha: float = 0.3
               ) -> tuple[Contrasted, Batch, dict[str, Tensor]]:
    """The contrast of those rows, their batch with counts of all processes, and the leaves it is made of."""
    leaves = {name: value.requires_grad_() for name, value in vectors(seed).items()}
    batch = batch_of(rows)
    object.__setattr__(batch, "counts", sum_over_ranks(batch.counts))
    own, kept = ({name: given[name][torch.from_numpy(rows[has(name)[rows]])] for name in MODALITIES}
                 for given in (leaves, vectors(seed + 100)))
    return contrast(own, kept, batch, alpha), batch, leaves


def new() -> MomentumContrast:
    torch.manual_seed(7)
    return MomentumContrast(MODALITIES, SPACE, RING)


def steps() -> dict[str, Tensor]:
    """Two steps of one micro-batch: losses, gradients, pairs and the ring, as all processes together have them."""
    contrast, found = new(), {}
    for turn in range(2):
        result, batch, leaves = contrasted(contrast, part(), turn)
        loss(result.terms).backward()
        found |= sum_over_ranks({f"{turn} {name}": term.total.detach() for name, term in result.terms.items()})
        gradients = {f"{turn} gradient {name}": leaf.grad for name, leaf in leaves.items()}
        found |= {name: sum_over_ranks({"": gradient})[""] for name, gradient in gradients.items()}
        found[f"{turn} scale"] = sum_over_ranks({"": contrast.temperature.log_scale.grad.clone()})[""]
        contrast.temperature.log_scale.grad = None
        found[f"{turn} pairs"] = pairs(result, batch)
        contrast.after_step([result.carry], TRUE)
    return found | dict(contrast.ring.named_buffers())


def of_plan(numbers: np.ndarray) -> np.ndarray:
    """Rows of the plan, from rows of all ranks, rank after rank."""
    each = ROWS // world()
    return numbers % each * world() + numbers // each


def pairs(result: Contrasted, batch: Batch) -> Tensor:
    """How often each text is matched with each context, (ROWS, ROWS) by rows of the plan; true pairs count 100."""
    pairing = pair_up(result, batch, torch.tensor([9.0]))
    assert pairing.true == usable(batch).sum()
    torch.testing.assert_close(pairing.share.sum(), torch.tensor(float(pairing.true)))
    found = np.zeros((ROWS, ROWS))
    np.add.at(found, (of_plan(pairing.text), of_plan(pairing.context)), np.where(np.arange(len(pairing.text))
                                                                                < pairing.true, 100, 1))
    return sum_over_ranks({"": torch.from_numpy(found)})[""]


def micro_steps(world_and_micros: int) -> dict[str, Tensor]:
    """Three steps of several micro-batches, the second of which was skipped: what the ring then holds."""
    contrast = new()
    for turn, kept in enumerate((TRUE, FALSE, TRUE)):
        carries = [contrasted(contrast, part(micro, world_and_micros), turn)[0].carry
                   for micro in range(world_and_micros)]
        contrast.after_step(carries, kept)
    return dict(contrast.ring.named_buffers())


def in_two(folder: Path) -> None:
    """What each of two processes does."""
    with processes():
        found = {"steps": steps(), "micro": micro_steps(2)}
        if rank() == 0:
            torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("two")
    assert Job(2, in_two, folder).wait() == [0, 0]
    return torch.load(folder / "found.pt", weights_only=True)


def test_two_processes_find_what_one_finds(two: dict[str, dict[str, Tensor]]) -> None:
    expected = steps()
    assert expected.keys() == two["steps"].keys()
    for name, value in expected.items():
        torch.testing.assert_close(two["steps"][name], value, rtol=1e-5, atol=1e-6,
                                   msg=lambda text, at=name: f"{at}: {text}")
    assert all(expected[f"0 gradient {name}"].any() for name in MODALITIES) and expected["0 scale"].any()


def by_hand(turns: tuple[int, ...]) -> deque[tuple[dict[str, Tensor], int]]:
    """The last rows of those steps, in the order of the plan."""
    ring: deque[tuple[dict[str, Tensor], int]] = deque(maxlen=RING)
    for turn in turns:
        kept = vectors(turn + 100)
        for row in range(ROWS):
            ring.append(({name: kept[name][row] for name in MODALITIES if has(name)[row]}, int(PICTURES[row])))
    return ring


@pytest.mark.parametrize("processes_and_micros", [1, 2])
def test_the_ring_holds_the_rows_of_the_plan_in_order(
    two: dict[str, dict[str, Tensor]], processes_and_micros: int
) -> None:
    ring = micro_steps(1) if processes_and_micros == 1 else two["micro"]
    place = int(ring["place"])
    assert place == 2 * ROWS % RING
    for age, (kept, picture) in enumerate(by_hand((0, 2))):
        row = (place + age) % RING  # the oldest is the next to be written over
        assert int(ring["picture"][row]) == picture
        for name in MODALITIES:
            assert bool(ring[f"has_{name}"][row]) == (name in kept)
            assert torch.equal(ring[name][row], kept.get(name, torch.zeros(SPACE)))


def test_micro_batches_of_one_process_make_the_same_ring(two: dict[str, dict[str, Tensor]]) -> None:
    for name, value in micro_steps(4).items():
        assert torch.equal(value, two["micro"][name])


def test_pairs_are_of_two_pictures_and_one_kind_of_context(two: dict[str, dict[str, Tensor]]) -> None:
    matched = two["steps"]["0 pairs"].numpy()
    text, context = np.nonzero(matched % 100)
    assert len(text) > 10
    assert (PICTURES[text] != PICTURES[context]).all()
    batch = batch_of(np.arange(ROWS))
    own, kind = usable(batch), batch.host["context"]
    assert own[text].all() and own[context].all() and not own.all()
    true = np.flatnonzero(own)
    assert np.array_equal(np.stack(np.nonzero(matched >= 100)), [true, true])
    rank_of = np.arange(ROWS) % 2
    assert (rank_of[text] != rank_of[context]).any() and (rank_of[text] == rank_of[context]).any()
    assert len({tuple(row) for row in kind[own]}) == 3  # picture, speech and both


def test_a_text_is_never_matched_with_another_kind_of_context_than_its_own() -> None:
    result, batch, _ = contrasted(new(), np.arange(ROWS), 0)
    pairing = pair_up(result, batch, torch.tensor([9.0]))
    count, kind = int(usable(batch).sum()), batch.host["context"]
    with_wrong_context = slice(pairing.true, len(pairing.text) - count)
    assert np.array_equal(kind[pairing.text[with_wrong_context]], kind[pairing.context[with_wrong_context]])


def test_hard_negatives_are_the_closest_and_random_ones_are_not() -> None:
    """Rows 0 and 8 say the same of two pictures."""
    hard, evenly = 0, 0
    for seed in range(20):
        contrast, batch = new(), batch_of(np.arange(ROWS))
        batch.extra["row_key"] = batch.extra["row_key"] + seed * 977
        made = vectors(seed)
        for name in MODALITIES:
            made[name][8] = made[name][0]
            if name != "text":
                made[name] = made["text"].clone()
        of_sequences = {name: made[name][torch.from_numpy(has(name))] for name in MODALITIES}
        result = contrast(of_sequences, of_sequences, batch, 0.0)
        for scale in (40.0, 0.0):
            pairing = pair_up(result, batch, torch.tensor([scale]))
            wrong = dict(zip(pairing.context[pairing.true :], pairing.text[pairing.true :], strict=True))
            hard, evenly = (hard + (wrong[0] == 8), evenly) if scale else (hard, evenly + (wrong[0] == 8))
    assert hard > 15 and evenly < 8
