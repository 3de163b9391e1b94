"""A probe that looks: a newly learned attentional pooler over frozen states, then a linear layer, as in CoCa.

    samples --System.alone, once--> States of each modality --AttentionalPooler, learned--> Q x W numbers each, side by
    side --LayerNorm, Linear, learned--> scores --> mAP

Where the linear probe reads what the system has pooled, this one pools for itself, so that nothing need stand in one
vector (arXiv 2205.01917, section 3.2: a pooler of its own for each task, the encoder frozen). Trained by AdamW for a
fixed number of steps on the same samples; its weight decay is the one that does best on the same held-out part.
Shape legend: N samples, B samples of a step, C classes, Q queries, W width of the pooler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from eval.labelled import Score
from eval.metrics import mean_average_precision
from eval.probing import Exam
from eval.task import Split, Task
from opt.nn.pool import AttentionalPooler
from opt.nn.states import States
from opt.progress import progress

WIDTH, HEADS, QUERIES = 128, 4, 4
DECAYS = (0.01, 1.0)
STEPS, BATCH, RATE, WARMUP = 400, 64, 2e-3, 0.1

Parts = Mapping[str, States]
"""States of the same samples by modality, frozen."""


class AttentionProbe(nn.Module):
    """Poolers over the states of each modality, and a linear layer over what they found.

    widths: of the states, by modality. rate_C: share of samples that each class is in, where its scores begin.
    """

    def __init__(self, widths: Mapping[str, int], rate_C: Tensor) -> None:
        super().__init__()
        self.poolers = nn.ModuleDict(
            {name: AttentionalPooler(WIDTH, HEADS, QUERIES, width) for name, width in widths.items()})
        self.norm = nn.LayerNorm(len(widths) * QUERIES * WIDTH)
        self.linear = nn.Linear(len(widths) * QUERIES * WIDTH, len(rate_C))
        with torch.no_grad():
            self.linear.bias.copy_(torch.logit(rate_C))

    def forward(self, parts: Parts) -> Tensor:
        """Scores (B, C)."""
        pooled = [_pooled(self.poolers[name], states) for name, states in parts.items()]
        return self.linear(self.norm(torch.cat(pooled, dim=1)))


def _pooled(pooler: nn.Module, states: States) -> Tensor:
    """(B, Q W); zeros for a sample whose sequence is empty, as of a picture in which no object was found."""
    some = np.flatnonzero(states.lengths)
    found = states.hidden.new_zeros(len(states), QUERIES * WIDTH)
    if len(some):
        found[torch.from_numpy(some)] = pooler(states.take(some)).hidden.view(len(some), -1)
    return found


def frozen(task: Task, modality: str, numbers: np.ndarray, split: Split) -> States:
    """What the system knows of one modality of the samples by itself, float32 on the host: one entry a token."""
    def alone(samples: list) -> Sequence[States]:
        states = task.system.alone(samples, modality)
        return [States(states.hidden.float().cpu(), states.lengths)]

    whole = States.joined(task.batches(numbers, alone, f"read {modality}", split))
    return States(whole.hidden.clone(), whole.lengths)  # out of inference mode, so that a probe may learn from it


def look(exam: Exam, fitted: Parts, judged: Parts, device: torch.device) -> Score:
    """Fit on states of the training samples and judge those of the test samples."""
    held, verified = exam.held_out, exam.train_verified
    rows, apart = np.flatnonzero(~held), np.flatnonzero(held)
    within = None if verified is None else verified[apart]
    judgements = []
    with progress(f"learn to look at {' + '.join(fitted)}", total=len(DECAYS) + 1, unit="fits") as bar:
        for decay in DECAYS:
            found = scores(fit(exam, fitted, rows, decay, device), fitted, apart, device)
            judgements.append(mean_average_precision(found, exam.train_labels[apart], None, within))
            bar.advance(1)
        best = fit(exam, fitted, np.arange(len(held)), DECAYS[int(np.argmax(judgements))], device)
        bar.advance(1)
    return exam.judge(scores(best, judged, np.arange(len(exam.test_numbers)), device))


def fit(exam: Exam, parts: Parts, rows: np.ndarray, decay: float, device: torch.device) -> AttentionProbe:
    """A probe learned from some training samples: the same for the same seed, whatever was drawn before."""
    labels_NC = torch.from_numpy(exam.train_labels).float()
    counts_NC = torch.ones_like(labels_NC) if exam.train_verified is None else torch.from_numpy(exam.train_verified)
    shares_NC = counts_NC[rows] / counts_NC[rows].sum(0).clamp(min=1)  # of each sample in the mean of a class
    labels_NC = labels_NC[rows]
    rate_C = (labels_NC * shares_NC).sum(0).clamp(1e-4, 1 - 1e-4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(exam.seed)
        model = AttentionProbe({name: states.hidden.shape[1] for name, states in parts.items()}, rate_C).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=WARMUP)
    random = np.random.default_rng(exam.seed)
    for _ in range(STEPS):
        drawn = random.choice(len(rows), min(BATCH, len(rows)), replace=False)
        logits_BC = model(_taken(parts, rows[drawn], device))
        targets_BC, shares_BC = labels_NC[drawn].to(device), shares_NC[drawn].to(device)
        entropy = nn.functional.softplus(logits_BC) - targets_BC * logits_BC
        optimizer.zero_grad()
        ((entropy * shares_BC).sum() * len(rows) / len(drawn)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def scores(model: AttentionProbe, parts: Parts, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """(len(rows), C) float32."""
    pieces = [model(_taken(parts, rows[first : first + BATCH], device)).cpu() for first in range(0, len(rows), BATCH)]
    return torch.cat(pieces).numpy()


def _taken(parts: Parts, rows: np.ndarray, device: torch.device) -> Parts:
    taken = {name: states.take(rows) for name, states in parts.items()}
    return {name: States(states.hidden.to(device), states.lengths) for name, states in taken.items()}
