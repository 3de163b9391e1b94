"""What a step costs, before it is taken: operations, bytes, and what the processor could do at best.

    work       one forward, of fake tensors where it can be --> operations, bytes kept for backward
    memory     those bytes beside weights, gradients and moments; available: the bytes there are
    peak       operations a second: the maker's figure for known GPUs, a measured matrix product elsewhere
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from opt.data.batch import Batch
from opt.data.layout import AttentionLayout
from opt.nn.attention import Attention
from opt.nn.multiway import MultiwayAttention
from opt.systems.system import Progress, System, build

DENSE_BFLOAT16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
                  "4090": 165e12}
"""Operations a second of bfloat16 matrix products without sparsity, by the maker; by words of the device's name."""
MEASURED_SECONDS = 0.1
PROJECTIONS = (torch.ops.aten.mm, torch.ops.aten.addmm)
"""What attention is counted by its operations for; its inner products are counted by pairs."""


@dataclass(frozen=True)
class Work:
    """What one micro-batch asks for. flops: operations of its matrix products and attention, forward and backward.

    tokens: its real tokens. activation_bytes: kept from forward for backward, besides the weights; cast_bytes: copies
    of the weights in bfloat16, which autocast keeps; batch_bytes: the batch itself.
    """

    flops: float
    tokens: int
    activation_bytes: int
    cast_bytes: int
    batch_bytes: int


def work(system: System, batch: Batch, bfloat16: bool, device: torch.device) -> Work:
    """Count one training step of `batch` on `device` by a forward; backward is twice as much.

    Matrix products and convolutions count 2 for each multiply-add of their shapes; what runs without gradient has no
    backward. Attention counts real pairs only, 4 D for each, half of them when causal, whatever kernel computes it.
    Filler tokens cost bytes but are no work. It is a twin that runs: `system` may be compiled or spread over
    processes, and no other process needs to take part. A forward whose shapes depend on values, as where hard negatives
    are picked, has no fake, nor has a system that copies its own parts: there the twin is a real one.
    """
    told = logging.getLogger("torch._subclasses.fake_tensor")
    before = told.level
    try:
        told.setLevel(logging.CRITICAL + 1)  # what a fake cannot do is no news
        with warnings.catch_warnings(action="ignore"):  # of copies of fakes
            return _counted(system, batch, bfloat16, device, FakeTensorMode())
    except (DataDependentOutputException, RuntimeError):  # what a fake cannot do is said in many ways
        return _counted(system, batch, bfloat16, device, None)
    finally:
        told.setLevel(before)


def _counted(
    system: System, batch: Batch, bfloat16: bool, device: torch.device, fake: FakeTensorMode | None
) -> Work:
    """`work` by one forward of a twin, fake or real."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(_alone())
        stack.enter_context(fake or nullcontext())
        counter = _Counter()
        twin = _twin(system, device)
        stands_in = fake.from_tensor if fake else torch.Tensor.detach
        shapes = _mapped(batch, lambda tensor: counter.batch.add(stands_in(tensor).to(device)))
        for tensor in [*twin.parameters(), *twin.buffers()]:
            counter.weights.add(tensor)
        for module in twin.modules():
            if isinstance(module, Attention | MultiwayAttention):
                module.register_forward_pre_hook(counter.enter_attention)
                module.register_forward_hook(counter.leave_attention, with_kwargs=True)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(counter.save, lambda tensor: tensor))
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=bfloat16))
        stack.enter_context(counter)
        twin(shapes, Progress(0, 0.0))
    flops = counter.products * _real_share(batch) + counter.attention
    return Work(flops, batch.tokens, counter.saved.size, counter.casts.size, counter.batch.size)


def _twin(system: System, device: torch.device) -> System:
    """A system of the same sizes; under FakeTensorMode it takes neither memory nor time."""
    with device:
        twin = build(system.name, system.config, system.tokenizer if system.reads_text else None, system.facts)
    trained = {name: parameter.requires_grad for name, parameter in system.named_parameters()}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    return twin.train(system.training)


def _real_share(batch: Batch) -> float:
    """Real tokens among those that the batch carries: less than 1 where filler brings it to a fixed size."""
    carried = sum(len(view.gather) for view in batch.views.values())
    carried += sum(len(writing.ids) for writing in batch.writings.values())
    return batch.tokens / carried if carried else 1.0


@contextmanager
def _alone() -> Iterator[None]:
    """A forward that asks no other process: fake tensors have nothing to send."""
    before = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = before


class _Storages:
    """Distinct storages and their bytes. Keeps them alive, so that no address comes twice."""

    def __init__(self) -> None:
        self._found: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._found[storage._cdata] = storage
        return tensor

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._found

    @property
    def size(self) -> int:
        return sum(storage.nbytes() for storage in self._found.values())


class _Counter(TorchDispatchMode):
    """Sees every operation of a forward, and what is saved for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.attention = 0.0, 0.0
        self.weights, self.batch, self.casts, self.saved = (_Storages() for _ in range(4))
        self._attending = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        if operation is torch.ops.aten._to_copy and args[0] in self.weights:
            self.casts.add(result)
        if operation in (PROJECTIONS if self._attending else flop_registry):
            self.products += _passes() * flop_registry[operation](*args, **(kwargs or {}), out_val=result)
        return result

    def enter_attention(self, module: nn.Module, inputs: Any) -> None:
        self._attending = True

    def leave_attention(self, module: nn.Module, inputs: Any, named: dict[str, Any], output: Tensor) -> None:
        layout = next(value for value in [*inputs, *named.values()] if isinstance(value, AttentionLayout))
        causal = any(value is True for value in [*inputs, *named.values()])
        self.attention += _passes() * 4 * output.shape[-1] * layout.pairs / (2 if causal else 1)
        self._attending = False

    def save(self, tensor: Tensor) -> Tensor:
        if not any(tensor in known for known in (self.weights, self.batch, self.casts)):
            self.saved.add(tensor)
        return tensor


def _passes() -> int:
    """Forward, and backward twice as much where there is one."""
    return 3 if torch.is_grad_enabled() else 1


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch, or a part of one, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _mapped(getattr(value, field.name), change) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    if isinstance(value, dict):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(entry, change) for entry in value)
    return value


@dataclass(frozen=True)
class Memory:
    """Bytes of one process while it trains."""

    weights: int
    gradients: int
    moments: int
    casts: int = 0
    activations: int = 0
    batch: int = 0

    @property
    def states(self) -> int:
        """What no smaller batch makes smaller."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        return self.states + self.casts + self.activations + self.batch


def state_memory(system: nn.Module, parallel: Literal["ddp", "fsdp"] = "ddp", world: int = 1) -> Memory:
    """Weights, gradients and AdamW's two moments; a share of them in each process under fsdp. No batch yet."""
    share = world if parallel == "fsdp" else 1
    weights = sum(tensor.nbytes for tensor in [*system.parameters(), *system.buffers()])
    trained = sum(parameter.nbytes for parameter in system.parameters() if parameter.requires_grad)
    return Memory(weights // share, trained // share, 2 * trained // share)


def memory(system: nn.Module, work: Work, parallel: Literal["ddp", "fsdp"] = "ddp", world: int = 1) -> Memory:
    """`state_memory`, and what `work` keeps."""
    return dataclasses.replace(state_memory(system, parallel, world), casts=work.cast_bytes,
                               activations=work.activation_bytes, batch=work.batch_bytes)


def available(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine and of the control groups it is in.

    Where the kernel does not say what is free (other systems than Linux), all of the machine's memory.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return min([int(found[1]) * 1024, *_control_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def _control_groups(root: Path, own: Path) -> Iterator[int]:
    """Bytes left in each control group around this process, of version 2 or 1; what can be dropped counts as left."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names = ("memory.max", "memory.current") if not controllers else (
            "memory.limit_in_bytes", "memory.usage_in_bytes")
        folder = root / controllers / name.lstrip("/")
        for group in [folder, *folder.parents]:
            most, used, about = group / names[0], group / names[1], group / "memory.stat"
            if root in (group, *group.parents) and most.is_file() and most.read_text().strip().isdigit():
                dropped = re.search(r"^(?:total_)?inactive_file (\d+)", about.read_text(), flags=re.M)
                yield int(most.read_text()) - int(used.read_text()) + (int(dropped[1]) if dropped else 0)


@dataclass(frozen=True)
class Peak:
    """Operations a second of matrix products at best, and where the figure comes from."""

    flops_per_second: float
    source: str


def peak(device: torch.device, bfloat16: bool = True) -> Peak:
    """Of the table, for bfloat16 on a GPU that it names; else measured, a tenth of a second, in the training's type."""
    if device.type == "cuda" and bfloat16:
        name = torch.cuda.get_device_name(device)
        if (figure := listed(name)) is not None:
            return Peak(figure, f"{name}, bfloat16 by its maker")
    kind = torch.bfloat16 if bfloat16 else torch.float32
    return Peak(measured_product(device, kind), f"{str(kind).removeprefix('torch.')} matrix product, measured")


def listed(name: str) -> float | None:
    """The table's figure for a GPU of this name."""
    words = set(re.findall(r"\w+", name))
    return next((figure for known, figure in DENSE_BFLOAT16.items() if set(known.split()) <= words), None)


def measured_product(device: torch.device, kind: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of three or more within MEASURED_SECONDS."""
    rows, inner, columns = (1024, 768, 3072) if device.type == "cpu" else (8192, 8192, 8192)
    own = torch.Generator(device).manual_seed(0)  # the run's generator stays where it is
    left = torch.randn(rows, inner, dtype=kind, device=device, generator=own)
    right = torch.randn(inner, columns, dtype=kind, device=device, generator=own)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < MEASURED_SECONDS:
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * rows * inner * columns / min(seconds)
