"""How a system is trained: the loop and the optimizer. A preset carries its recipe; the command line may change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoopConfig:
    """How long and how to train."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_tokens: int = 8192
    """Tokens of one step's batch, over all processes and micro-batches: as many samples as fit (gap A16)."""
    accumulate: int = 1
    """Micro-batches of a step: their gradients are summed before the weights move, and each needs memory for itself.
    Negatives of contrast come from one micro-batch, over all processes."""
    multiple: int = 8
    """Rows of a batch come in multiples of this, which processes x accumulate must divide. It fixes the data order, so
    that a run may go on with another number of processes."""
    seed: int = 0
    """Of new weights, the order of samples, what is hidden, dropout."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """bfloat16 where the processor multiplies it fast (auto), or bfloat16 or float32; losses and weights are float32.
    """
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes (torchrun): ddp keeps the whole model in each, fsdp a share of weights, gradients, moments.
    One process has nothing to share."""
    compile: bool = True
    """On CUDA, compile the transformer blocks; a CPU runs them as they are."""
    workers: int = 1
    """Processes that read and pack batches, for each training process."""
    log_every: int = 10
    """Steps between lines of metrics."""
    save_every: int = 200
    """Steps between states to go on from."""
    keep: int = 2
    """Checkpoints kept."""
    max_skipped: int = 10
    """A step whose loss or gradient is not finite moves nothing and is named; so many in a row end the run."""
    validate_every: int = 0
    """Steps between validations on the held-out shards; 0: whenever a state is saved."""
    validate_batches: int = 16
    """Batches of a validation, always the same ones."""
    patience: int = 0
    """Validations without a better loss after which the run ends early; 0: it never does."""


@dataclass(frozen=True)
class OptimConfig:
    """How weights move: AdamW (gap A15)."""

    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises from zero."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How the rate falls to `final` of its height afterwards."""
    final: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    """Not applied to biases, norms and other vectors."""
    clip: float = 1.0
    """Largest gradient norm."""


@dataclass(frozen=True)
class Stage:
    """A stage of a training in several: what its rows show, what is asked of them, and which parameters move."""

    name: str = "all"
    data: tuple[str, ...] = ("text", "image", "audio")
    """Modalities that rows show, of those that samples have and the system reads."""
    objectives: tuple[str, ...] = ()
    """Terms of the loss; none: all that the system has."""
    trains: tuple[str, ...] = ("*",)
    """Which parameters move, by patterns of their names; the others stay as they are, to the bit."""
    share: float = 1.0
    """Share of the steps of all stages."""
