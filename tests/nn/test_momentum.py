"""The twin against its formula, the ring against a deque; skipped steps, saved states, rows that wrap."""

from collections import deque

import pytest
import torch
from torch import Tensor, nn

from opt.nn.momentum import Ring, Twin

YES, NO = torch.tensor(True), torch.tensor(False)


class Tied(nn.Module):
    """A table used twice, dropout, and buffers of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, number: Tensor, factor: float = 1.0) -> Tensor:
        return factor * self.head(self.drop(self.norm(self.table(number))))


def moved(module: nn.Module) -> None:
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            value.add_(torch.randn(value.shape).mul(4).to(value.dtype))


def test_the_twin_is_the_moving_average_by_name_and_in_place() -> None:
    torch.manual_seed(0)
    online = Tied()
    twin = Twin(online, 0.9)
    wanted = {name: value.detach().clone().double() for name, value in online.named_parameters()}
    places = [value.data_ptr() for value in twin.copy.parameters()]
    for _ in range(5):
        moved(online)
        twin.update(online, YES)
        wanted = {name: 0.9 * value + 0.1 * online.get_parameter(name) for name, value in wanted.items()}
    for name, value in twin.copy.named_parameters():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6)
    assert [value.data_ptr() for value in twin.copy.parameters()] == places
    assert twin.copy.head.weight is twin.copy.table.weight and twin.copy.table.weight is not online.table.weight
    for name, value in twin.copy.named_buffers():
        assert torch.equal(value, online.get_buffer(name))


def test_a_skipped_step_leaves_the_twin_as_it_was_whatever_the_model_holds() -> None:
    online = Tied()
    twin = Twin(online, 0.9)
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    with torch.no_grad():
        for value in online.parameters():
            value.fill_(float("nan"))
    online.norm.running_mean.fill_(float("inf"))
    online.norm.num_batches_tracked.fill_(7)
    twin.update(online, NO)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


@pytest.mark.parametrize(("momentum", "follows"), [(1.0, False), (0.0, True)])
def test_the_ends_of_momentum(momentum: float, follows: bool) -> None:
    online = nn.Linear(3, 2)
    twin = Twin(online, momentum)
    before = twin.copy.weight.clone()
    moved(online)
    twin.update(online, YES)
    assert torch.equal(twin.copy.weight, online.weight if follows else before)


def test_the_twin_never_learns_nor_drops_out() -> None:
    online = Tied()
    parent = nn.ModuleDict({"online": online, "twin": Twin(online, 0.9)})
    parent.train()
    assert online.drop.training and not any(module.training for module in parent["twin"].modules())
    assert not any(value.requires_grad for value in parent["twin"].parameters())
    twin = parent["twin"]
    number = torch.tensor([1, 2, 3])
    first, second = twin(number, factor=2.0), twin(number, factor=2.0)
    assert torch.equal(first, second) and not first.requires_grad
    online.eval()
    assert torch.equal(first, online(number, factor=2.0))
    assert not Twin(nn.Sequential(nn.Linear(2, 2)), 0.5)(torch.ones(1, 2, requires_grad=True)).requires_grad


def test_a_twin_of_a_narrow_model_keeps_what_float32_keeps() -> None:
    online = nn.Linear(2, 2).bfloat16()
    twin = Twin(online, 0.995)
    assert twin.copy.weight.dtype == torch.float32
    with torch.no_grad():
        online.weight.add_(2**-6)
    before = twin.copy.weight.clone()
    twin.update(online, YES)
    torch.testing.assert_close(twin.copy.weight, before + 0.005 * (online.weight.float() - before))


def test_other_names_are_an_error_that_says_which() -> None:
    twin = Twin(nn.Sequential(nn.Linear(2, 2)), 0.9)
    with pytest.raises(ValueError, match=r"differ in \['0.bias'\]"):
        twin.update(nn.Sequential(nn.Linear(2, 2, bias=False)), YES)
    with pytest.raises(ValueError, match="running_mean"):
        Twin(nn.BatchNorm1d(2), 0.9).update(nn.BatchNorm1d(2, track_running_stats=False), YES)
    with pytest.raises(ValueError, match=r"momentum 1\.5"):
        Twin(nn.Linear(2, 2), 1.5)


def test_both_are_in_the_state_of_what_holds_them() -> None:
    def made() -> nn.ModuleDict:
        return nn.ModuleDict({"twin": Twin(Tied(), 0.9), "ring": Ring(3, {"text": torch.zeros(2)})})

    first, second = made(), made()
    first["ring"].push({"text": torch.randn(4, 2)}, YES)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(),
                                                 strict=True))
    new = {"text": torch.randn(2, 2)}
    for module in (first, second):
        module["ring"].push(new, YES)
    assert torch.equal(first["ring"].fields()["text"], second["ring"].fields()["text"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        Ring(4, {"text": torch.zeros(2)}).load_state_dict(first["ring"].state_dict())


EMPTY = {"text": torch.zeros(2), "has_text": torch.tensor(False), "picture": torch.tensor(-1)}


def rows(numbers: list[int]) -> dict[str, Tensor]:
    number = torch.tensor(numbers, dtype=torch.int64)
    return {"picture": number, "has_text": number % 2 == 0, "text": torch.stack([number, -number], 1).double()}


@pytest.mark.parametrize("size", [1, 5, 7])
def test_the_ring_is_a_deque(size: int) -> None:
    """Any number of rows, none and more than it holds too, several times around."""
    ring, reference, number = Ring(size, EMPTY), deque([-1] * size, maxlen=size), 0
    for pushed in (3, 1, 0, 4, 5, 2, 17, 1, 7, 10, 3):
        new = list(range(number, number + pushed))
        number += pushed
        ring.push(rows(new), YES)
        reference.extend(new)
        fields = ring.fields()
        order = (ring.place + torch.arange(size)) % size  # the oldest first
        assert fields["picture"][order].tolist() == list(reference)
        filled = fields["picture"] >= 0
        assert torch.equal(fields["has_text"], filled & (fields["picture"] % 2 == 0))
        assert torch.equal(fields["text"][filled, 0].long(), fields["picture"][filled])
        assert not fields["text"][~filled].any() and fields["text"].dtype == torch.float32


def test_a_skipped_step_leaves_the_ring_as_it_was() -> None:
    ring = Ring(4, EMPTY)
    ring.push(rows([1, 2, 3]), YES)
    before = {name: value.clone() for name, value in ring.state_dict().items()}
    bad = rows([4, 5])
    bad["text"].fill_(float("nan"))
    ring.push(bad, NO)
    assert all(torch.equal(value, before[name]) for name, value in ring.state_dict().items())


def test_what_was_read_does_not_see_what_is_written_after_it() -> None:
    ring = Ring(2, {"text": torch.zeros(1)})
    read = ring.fields()["text"]
    ring.push({"text": torch.ones(1, 1, requires_grad=True)}, YES)
    assert not read.any() and ring.fields()["text"].sum() == 1 and not ring.fields()["text"].requires_grad


def test_a_ring_takes_only_whole_rows() -> None:
    ring = Ring(4, EMPTY)
    for wrong, words in (
        ({name: value for name, value in rows([1]).items() if name != "picture"}, "not"),
        (rows([1, 2]) | {"picture": torch.tensor([1])}, "rows of"),
        (rows([1, 2]) | {"text": torch.ones(2, 1)}, "text"),
    ):
        with pytest.raises(ValueError, match=words):
            ring.push(wrong, YES)
    assert ring.place == 0 and (ring.fields()["picture"] == -1).all()
    with pytest.raises(ValueError, match="0 rows"):
        Ring(0, EMPTY)
