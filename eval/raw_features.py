"""Raw features: what a probe reads without any model, one vector a sample, to be set beside the model's own.

    regions (R, D) --mean--> (D,)    frames (T, D) --mean--> (D,)    caption --count its words--> (V,)

A sample without the part has no such vector, never zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from eval.words import normalise
from opt.data.record import Sample

VOCABULARY = 2000
"""Words counted: the commonest of the training captions."""


def vocabulary(captions: Iterable[str | None]) -> dict[str, int]:
    """Column of each counted word: the `VOCABULARY` commonest; words of equal count in alphabetical order."""
    counts = Counter(word for caption in captions for word in normalise(caption or "").split())
    commonest = sorted(counts, key=lambda word: (-counts[word], word))[:VOCABULARY]
    return {word: column for column, word in enumerate(commonest)}


def raw_features(sample: Sample, columns: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The vectors of the parts that `sample` has, float32, by modality. `columns` is a `vocabulary`."""
    found: dict[str, np.ndarray] = {}
    if sample.caption and sample.caption.strip():
        words = [columns[word] for word in normalise(sample.caption).split() if word in columns]
        found["text"] = np.bincount(words, minlength=len(columns)).astype(np.float32)
    regions = [picture.regions for picture in sample.pictures if picture.regions is not None and len(picture.regions)]
    if regions:
        found["image"] = np.concatenate(regions).astype(np.float32).mean(0)
    if sample.speech is not None and len(sample.speech):
        found["audio"] = sample.speech.astype(np.float32).mean(0)
    return found
