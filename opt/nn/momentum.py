"""Momentum contrast's memory: a twin that follows slowly, and a ring of what it said of earlier samples (MoCo, arXiv
1911.05722; as ALBEF and BLIP use them).

    forward      keys = the twin's vectors, and the ring's fields as they are
    after_step   twin.update(online, kept), then ring.push(the step's vectors, kept)

Both move once per optimizer step, never in a forward, which runs once per micro-batch; nothing moves where the step was
skipped, and nothing waits for the device to know. All they hold is in the state dict.
Shape legend: B new rows, R rows of the ring.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Twin(nn.Module):
    """A copy of `online` in float32 that no gradient reaches and that never drops out: its exponential moving average.

    momentum: the share of the copy that stays in each update, in [0, 1]. `copy` is the module, for calls of its
    methods. Tie and initialise before making it.
    """

    def __init__(self, online: nn.Module, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum {momentum} is not within 0 and 1")
        self.momentum = momentum
        self.copy = copy.deepcopy(online).float().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Twin:
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.copy(*args, **kwargs)

    @torch.no_grad()
    def update(self, online: nn.Module, kept: Tensor) -> None:
        """A step towards the parameters of `online`; its buffers as they are. kept: bool scalar on the device; where
        False nothing moves, whatever `online` holds. Raises ValueError where names differ."""
        followed, leading = _paired(dict(self.copy.named_parameters()), dict(online.named_parameters()), kept)
        if followed:
            torch._foreach_lerp_(followed, leading, 1 - self.momentum)
        followed, leading = _paired(dict(self.copy.named_buffers()), dict(online.named_buffers()), kept)
        if followed:
            torch._foreach_copy_(followed, leading)


class Ring(nn.Module):
    """The last `rows` rows of several fields, side by side: what was pushed together stays in one row.

    empty: by field, the row that stands where nothing has been pushed yet; its shape and dtype are the field's.
    """

    place: Tensor

    def __init__(self, rows: int, empty: Mapping[str, Tensor]) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"a ring of {rows} rows holds nothing")
        self.rows, self.names = rows, tuple(empty)
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        for name, row in empty.items():
            self.register_buffer(name, row.detach().expand(rows, *row.shape).clone())

    @torch.no_grad()
    def push(self, new: Mapping[str, Tensor], kept: Tensor) -> None:
        """Writes B rows of every field over the oldest ones; of more than there are, the last stay. kept: bool scalar
        on the device; where False nothing changes. Raises ValueError for other fields, numbers or shapes of rows."""
        if set(new) != set(self.names):
            raise ValueError(f"the ring has the fields {sorted(self.names)}, not {sorted(new)}")
        pushed = len(next(iter(new.values())))
        for name, rows in new.items():
            if rows.shape != (pushed, *self.get_buffer(name).shape[1:]):
                raise ValueError(f"{pushed} rows of {name!r} cannot have the shape {tuple(rows.shape)}")
        written = min(pushed, self.rows)
        last_B = torch.arange(pushed - written, pushed, device=self.place.device)
        place_B = (self.place + last_B) % self.rows
        for name, rows in new.items():
            field = self.get_buffer(name)
            field[place_B] = torch.where(kept, rows[pushed - written :].to(field.dtype), field[place_B])
        self.place.add_(kept * pushed).remainder_(self.rows)

    def fields(self) -> dict[str, Tensor]:
        """Every field (R, ...) as it is now, in no order of age: later pushes do not show."""
        return {name: self.get_buffer(name).clone() for name in self.names}


def _paired(
    followed: dict[str, Tensor], leading: dict[str, Tensor], kept: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """This process's parts of both, by name; a leading one is the followed one itself where `kept` is False."""
    if followed.keys() != leading.keys():
        raise ValueError(f"the twin and the model differ in {sorted(followed.keys() ^ leading.keys())}")
    own = [_own(value) for value in followed.values()]
    return own, [torch.where(kept, _own(leading[name]), value).to(value.dtype)
                 for name, value in zip(followed, own, strict=True)]


def _own(value: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in place."""
    return value.to_local() if isinstance(value, DTensor) else value
