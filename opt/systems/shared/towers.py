"""Systems with a tower for each modality: what they can do by their towers alone.

    samples --inputs--> Batch --encode--> States of each modality --vector--> unit vectors --mean--> embed

A system gives `encode` and `vector`; a clip of several pictures is the mean of their vectors, and all their tokens.
Shape legend: B samples, S sequences, E width of the shared space, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from opt.config import UserError
from opt.data.batch import Batch
from opt.data.record import Sample
from opt.nn.states import States
from opt.systems.system import MODALITIES, System


class TowerSystem(System):
    """Base of systems that read each modality by itself first."""

    towers: nn.ModuleDict

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it reads: text and pictures, and speech where it hears."""
        return MODALITIES if self.config.hears else ("text", "image")

    def preparer(self) -> Any:
        """Samples -> a sequence a modality: `TowerRows`, or what is asked by them."""
        raise NotImplementedError

    def encode(self, modality: str, batch: Batch) -> States:
        """The sequences of one modality through its tower in `towers`, unless a system has another way."""
        return self.towers[modality](batch.table(modality), batch.views[modality])

    def vector(self, modality: str, states: States) -> Tensor:
        """Unit vectors (S, E) float32 of a modality's sequences in the shared space."""
        raise NotImplementedError

    def summary(self, modality: str, states: States) -> Tensor:
        """What sums a modality's sequences up (S, D): their first states, unless a system reads another one."""
        return states.first

    @torch.inference_mode()
    def embed(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Tensor:
        """Each modality through its tower; several are averaged, as the pictures of a clip are, then unit length."""
        vectors = []
        for name in modalities:
            batch = self._inputs(samples, name)
            found_SE, pictures = self.vector(name, self.encode(name, batch)), batch.host["pictures"]
            if name == "image" and len(found_SE) > len(samples):
                sample_S = torch.from_numpy(np.repeat(np.arange(len(samples)), pictures)).to(self.device)
                found_SE = normalize(found_SE.new_zeros(len(samples), found_SE.shape[1])
                                     .index_add_(0, sample_S, found_SE), dim=-1)
            vectors.append(found_SE)
        return normalize(torch.stack(vectors).sum(0), dim=-1)

    @torch.inference_mode()
    def alone(self, samples: Sequence[Sample], modality: str) -> States:
        """The tower's states of one modality; pictures of a clip one behind the other."""
        return self.unfused(modality, self._inputs(samples, modality))

    def unfused(self, modality: str, batch: Batch) -> States:
        """What one modality of `inputs` is before others join it; pictures of a clip one behind the other."""
        return as_clips(self.encode(modality, batch), modality, batch)

    @torch.inference_mode()
    def features(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Tensor:
        """What sums each modality up, and the mean of all of its states, side by side."""
        parts = []
        for name in modalities:
            batch = self._inputs(samples, name)
            states = as_clips(self.encode(name, batch), name, batch)
            row_N = torch.from_numpy(np.repeat(np.arange(len(states)), states.lengths)).to(self.device)
            sums_SD = states.hidden.new_zeros(len(states), states.hidden.shape[1]).index_add_(0, row_N, states.hidden)
            length_S1 = torch.from_numpy(states.lengths).to(self.device)[:, None]
            parts += [self.summary(name, states), sums_SD / length_S1]
        return torch.cat(parts, dim=1).float()

    def pooled(self, parts: Mapping[str, States]) -> Tensor:
        """One vector (P, W) of what sample p is in all `parts` together, each as `unfused` gives it."""
        raise self._cannot("fuse a text with a picture")

    def _inputs(self, samples: Sequence[Sample], modality: str) -> Batch:
        """Raises UserError for a modality that this model does not read."""
        if modality not in self.modalities:
            raise UserError(f"this {self.name} reads {' and '.join(self.modalities)}, not {modality}: pretrain "
                            f"{self.name}.trimodal, or give --model.hears")
        return self.preparer().inputs(samples, [modality]).to(self.device)


def as_clips(states: States, modality: str, batch: Batch) -> States:
    """Sequences of single pictures as those of whole samples."""
    pictures = batch.host["pictures"]
    if modality != "image" or len(states) == len(pictures):
        return states
    ends = np.cumsum(states.lengths)[np.cumsum(pictures) - 1]
    return States(states.hidden, np.diff(ends, prepend=0))
