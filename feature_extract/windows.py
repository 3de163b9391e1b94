"""A long recording in overlapping windows whose seams do not show.

    waveform --plan_windows--> windows of one length --network--> their frames --middles, joined--> frames of the whole

Convolutions put frame t of a network on samples t * stride to t * stride + field, so a window that begins at a frame
has exactly the frames of one long call, and as many. Each frame is taken from a window that knows at least `context`
frames on both sides of it. Group norm, which averages over time, is told the averages of the whole recording. What is
left is the attention to frames beyond the window. Shape legend: T frames, C channels, n samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

MOMENTS_CHUNK = 2**14
"""Outputs of the first convolution that are averaged at a time: bounds the memory, about 5 s of wav2vec 2.0."""


class FrameGrid(NamedTuple):
    """Where frames lie: frame t is made of samples t * stride to t * stride + field."""

    stride: int
    field: int

    def frames(self, samples: int) -> int:
        """Whole frames in so many samples."""
        return max(0, (samples - self.field) // self.stride + 1)

    def samples(self, start: int, stop: int) -> slice:
        """The samples that frames `start` to `stop` are made of."""
        return slice(start * self.stride, (stop - 1) * self.stride + self.field)


def frame_grid(convolutions: Iterable[nn.Conv1d]) -> FrameGrid:
    """The grid of convolutions without padding, first to last: 320 and 400 samples for those of wav2vec 2.0."""
    stride = field = 1
    for convolution in convolutions:
        field += (convolution.kernel_size[0] - 1) * stride
        stride *= convolution.stride[0]
    return FrameGrid(stride, field)


class Window(NamedTuple):
    """Frames `start` to `stop` are computed, `first` to `last` of them kept (numbers in the whole recording)."""

    start: int
    stop: int
    first: int
    last: int


def plan_windows(frames: int, window: int, context: int) -> list[Window]:
    """As few windows of `window` frames as cover the recording, evenly spread; seams in the middle of overlaps.

    Every frame is kept once, with `context` frames or the recording's end on either side. One window of all frames when
    they are no more than `window`, which must exceed 2 * context.
    """
    if frames <= window:
        return [Window(0, frames, 0, frames)]
    steps = -(-(frames - window) // (window - 2 * context))
    starts = [number * (frames - window) // steps for number in range(steps + 1)]
    seams = [0, *((left + window + right) // 2 for left, right in zip(starts, starts[1:], strict=False)), frames]
    return [Window(start, start + window, *seams[number : number + 2]) for number, start in enumerate(starts)]


def hear_in_windows(
    network: Callable[[Tensor], tuple[Tensor, ...]], waveform_1n: Tensor, grid: FrameGrid, windows: list[Window]
) -> tuple[Tensor, ...]:
    """What `network` makes of a waveform, each output (T, ...) on the CPU, joined from the windows' middles."""
    pieces = []
    for start, stop, first, last in windows:
        outputs = network(waveform_1n[:, grid.samples(start, stop)])
        pieces.append([output[first - start : last - start].cpu() for output in outputs])
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


class RecordingNorm(nn.GroupNorm):
    """Group norm of one channel a group, over a whole recording even where only a window of it is at hand.

    `moments`: mean and variance (C, 1) of each channel over the recording; None: those of what is at hand.
    """

    moments: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden_1CT: Tensor) -> Tensor:
        if self.moments is None:
            return super().forward(hidden_1CT)
        mean_C1, variance_C1 = self.moments
        scale_C1 = self.weight[:, None] * (variance_C1 + self.eps).rsqrt()
        return (hidden_1CT - mean_C1) * scale_C1 + self.bias[:, None]


def recording_norm(norm: nn.GroupNorm) -> RecordingNorm:
    """The same norm, with the same weights by the same names."""
    if norm.num_groups != norm.num_channels:
        raise ValueError(f"{norm.num_groups} groups of {norm.num_channels} channels; expected one channel a group")
    ours = RecordingNorm(norm.num_groups, norm.num_channels, norm.eps)
    ours.load_state_dict(norm.state_dict())
    return ours.requires_grad_(False).eval()


@contextmanager
def norm_of_recording(norm: RecordingNorm, convolution: nn.Conv1d, waveform_1n: Tensor) -> Iterator[None]:
    """While it lasts, `norm` is that of what `convolution`, the first one, makes of the whole waveform."""
    grid, total, squares = frame_grid([convolution]), 0.0, 0.0
    frames = grid.frames(waveform_1n.shape[1])
    for start in range(0, frames, MOMENTS_CHUNK):
        stop = min(start + MOMENTS_CHUNK, frames)
        out_CT = convolution(waveform_1n[:, None, grid.samples(start, stop)])[0].double()
        total, squares = total + out_CT.sum(1, keepdim=True), squares + out_CT.square().sum(1, keepdim=True)
    mean_C1 = torch.as_tensor(total) / frames
    variance_C1 = torch.as_tensor(squares) / frames - mean_C1.square()
    norm.moments = mean_C1.float(), variance_C1.clamp(min=0).float()
    try:
        yield
    finally:
        norm.moments = None
