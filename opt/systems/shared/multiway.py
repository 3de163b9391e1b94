"""Systems with one multiway transformer: each modality by itself, or several side by side in one sequence.

    text   [CLS] words [SEP]   \\
    image  [class] patches      > a sequence of the view "encoder": one, or several in the order of `config.reads`
    audio  [class] frames      /
    entries of all sequences --MultiwayStack: experts by modality--> States; the first state sums a sequence up

Dual encoder and fusion encoder are the same weights: what differs is what lies in a sequence.
Shape legend: N packed tokens, S sequences, P pairs, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from opt.config import UserError
from opt.data.batch import Batch, View
from opt.data.pack import FRAME, PATCH, TEXT, Packer, Part, Place
from opt.data.record import Sample
from opt.nn.heads import Pooler
from opt.nn.multiway import MultiwayStack
from opt.nn.relative import Bias
from opt.nn.states import States, side_by_side
from opt.systems.shared.asking import Answering
from opt.systems.shared.rows import TowerRows
from opt.systems.shared.towers import as_clips

TABLE = {"text": TEXT, "image": PATCH, "audio": FRAME}
PARTS = "parts"
"""The view of sequences of one modality each where training does not read them so."""


class MultiwayRows(TowerRows):
    """Sequences of all kinds in one view."""

    def packer(self) -> Packer:
        """An empty one whose views are over words, patches and frames."""
        tables = tuple(TABLE[name] for name in ("text", "image", "audio") if name in self.modalities)
        views = dict.fromkeys(["encoder", *map(self.view, self.modalities)], tables)
        return Packer(1, max(self.speech_width, 1), 3 * self.config.sight.patch**2, (PATCH, FRAME), views)

    def view(self, modality: str) -> str:
        """One for all modalities."""
        return "encoder"

    def join(self, packer: Packer, parts: Mapping[str, Part]) -> Place:
        """One sequence of several parts, each behind its own first entry, in the order of the configuration."""
        ordered = []
        for name in self.config.reads:
            if name in parts:
                ordered += [parts[name]] if name == "text" else [packer.first(TABLE[name]), parts[name]]
        return packer.sequence("encoder", ordered)


class MultiwaySystem(Answering):
    """Base of systems that read all modalities with one multiway transformer.

    A system has `embedders`, `stack` and `pooler`, and gives `vector`; its configuration says in `reads` which
    modalities it has, in the order in which they stand in a sequence.
    """

    embedders: nn.ModuleDict
    stack: MultiwayStack
    pooler: Pooler

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it reads."""
        return tuple(name for name in ("text", "image", "audio") if name in self.config.reads)

    def embedded(self, batch: Batch) -> Tensor:
        """Every entry of the batch's tables, which `gather` of its views counts: (entries, D)."""
        return torch.cat([self.embedders[name](batch.table(name)) for name in self.modalities])

    def entries(self, batch: Batch, view: View) -> Tensor:
        """Every token of a view's sequences before the stack: (N, D)."""
        return nn.functional.embedding(view.gather, self.embedded(batch))

    def own(self, batch: Batch) -> View:
        """Where each modality's sequences stand by themselves."""
        return batch.views.get(PARTS, batch.views["encoder"])

    def bias(self, view: View) -> Bias | None:
        """What attention adds to its scores in the sequences of a view. Nothing by default."""
        return None

    def read(self, entries_ND: Tensor, view: View) -> Tensor:
        """States of every token of a view's sequences (N, D)."""
        return self.stack(entries_ND, view, self.bias(view))

    def encode(self, modality: str, batch: Batch) -> States:
        """One modality's sequences by themselves."""
        view = self.own(batch)
        return States.of(self.read(self.entries(batch, view), view), view)

    def unfused(self, modality: str, batch: Batch) -> States:
        """Embedded words, patches or frames: modalities mix from the first layer on, so that this is all that pairs
        can share."""
        view = self.own(batch)
        return as_clips(States.of(self.entries(batch, view), view), modality, batch)

    def together(self, parts: Mapping[str, States]) -> States:
        """States of sequences that are sample p of all parts, each as `unfused` gives it, side by side."""
        names = [name for name in self.config.reads if name in parts]
        entries_ND, view = side_by_side([parts[name] for name in names], [TABLE[name] for name in names])
        return States.of(self.read(entries_ND, view), view)

    def pooled(self, parts: Mapping[str, States]) -> Tensor:
        """The first state of all parts together, pooled: (P, D)."""
        return cast(Tensor, self.pooler(self.together(parts).first))

    @torch.inference_mode()
    def features(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Tensor:
        """The first state of all modalities together, and the mean of all states, side by side."""
        states = self.together({name: self.alone(samples, name) for name in modalities})
        row_N = torch.from_numpy(np.repeat(np.arange(len(states)), states.lengths)).to(self.device)
        sums_SD = torch.zeros_like(states.first).index_add_(0, row_N, states.hidden)
        mean_SD = sums_SD / torch.from_numpy(states.lengths).to(self.device)[:, None]
        return torch.cat([states.first, mean_SD], dim=1).float()

    def require_parts(self, parts: Mapping[str, States]) -> None:
        """Raises UserError for fewer than two modalities, which there is nothing to match of."""
        if len(parts) < 2:
            raise UserError(f"{self.name} matches two modalities or three, not {' and '.join(parts) or 'none'}")
