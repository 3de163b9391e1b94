"""Published ways to search, by name: how many pictures, how many captions of each, in how many folds.

    split --Protocol.narrow--> sample numbers     split --Protocol.folds_of--> the fold of each sample

A figure called coco-5k must be measured on the whole of that split: where counts do not fit there is no figure.
Pictures count in the order of the shards, which is that of the annotation file, whoever extracted it.
Shape legend: N samples of the split.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from eval.task import Split
from opt.config import UserError


@dataclass(frozen=True)
class Protocol:
    """A test split as the literature quotes it."""

    name: str
    pictures: int
    captions: int
    """Captions of each picture: the first so many, where there are more."""
    folds: int
    """Equal runs of pictures, in order, each searched alone; figures are means over them."""
    rerank: int
    """Candidates of each query that are matched again, where nothing else is asked for."""
    about: str
    command: str
    """How to get the split."""

    def narrow(self, split: Split) -> np.ndarray:
        """The samples that are searched, ascending, int64 (pictures x captions,).

        Raises UserError where the split has another number of pictures, or a picture too few captions.
        """
        numbers = self._first_captions(split)
        places = self._places(split, numbers)
        count, told = len(np.unique(places)), np.bincount(places, minlength=1)
        if count != self.pictures:
            raise UserError(f"--protocol {self.name} is {self.pictures:,} pictures with their captions, and "
                            f"{split.reader.place} has {count:,}; {self._way_out}")
        if few := int((told < self.captions).sum()):
            raise UserError(f"--protocol {self.name} is {self.captions} captions a picture, and {few:,} of {count:,} "
                            f"pictures of {split.reader.place} have fewer; {self._way_out}")
        return numbers

    def folds_of(self, split: Split) -> np.ndarray:
        """The fold of each sample's picture, int64 (N,): the first pictures / folds of them are fold 0, and so on.

        A sample whose picture `narrow` leaves out counts with the picture before it.
        """
        first_seen = np.unique(split.groups[self._first_captions(split)], return_index=True)
        order = np.full(split.groups.max() + 1, -1)
        order[first_seen[0]] = np.argsort(np.argsort(first_seen[1]))
        place = np.maximum.accumulate(order[split.groups])
        return np.maximum(place, 0) // (self.pictures // self.folds)

    @property
    def _way_out(self) -> str:
        return f"extract it whole with `{self.command}`, and mend what failed with --retry-failed"

    def _first_captions(self, split: Split) -> np.ndarray:
        """The first captions of each picture, ascending. Where one is taken, one that is spoken, too, goes first."""
        numbers = split.with_all(("image", "text"))
        if self.captions == 1:
            numbers = numbers[np.argsort(~split.has["audio"][numbers], kind="stable")]
        taken: Counter[int] = Counter()
        kept = []
        for number, group in zip(numbers.tolist(), split.groups[numbers].tolist(), strict=True):
            taken[group] += 1
            if taken[group] <= self.captions:
                kept.append(number)
        return np.array(sorted(kept), np.int64)

    def _places(self, split: Split, numbers: np.ndarray) -> np.ndarray:
        """A number from 0 for each picture of `numbers`, (len(numbers),)."""
        return np.unique(split.groups[numbers], return_inverse=True)[1]


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "coco-5k", 5000, 5, 1, 256, "COCO, Karpathy's test split: 5,000 pictures, the first five captions of each",
            "opt extract karpathy COCO --dataset coco --split test --out SHARDS",
        ),
        Protocol(
            "coco-1k", 5000, 5, 5, 256, "coco-5k in five folds of 1,000 pictures in Karpathy's order: their mean",
            "opt extract karpathy COCO --dataset coco --split test --out SHARDS",
        ),
        Protocol(
            "flickr30k", 1000, 5, 1, 128, "Flickr30k, Karpathy's test split: 1,000 pictures, five captions each",
            "opt extract karpathy FLICKR30K --dataset flickr30k --split test --out SHARDS",
        ),
        Protocol(
            "openimages-5k", 5000, 1, 1, 256,
            "Open Images with narrations: 5,000 pictures of a frozen split, one narration each",
            "opt shards split SHARDS --test 5000 --name openimages-5k --out FROZEN",
        ),
    )
}  # fmt: skip
