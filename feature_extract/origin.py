"""What results call the corpus that is extracted: the same name whatever the extractors, the layout or the folder.

    karpathy --dataset coco, coco_captions, vqa_v2 -> coco    folder /data/pets -> folder pets

By it a result says whether a model has seen pictures of the corpus that it is measured on (docs/evaluation.md).
"""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

from feature_extract.sources.item import Source
from feature_extract.sources.reading import MALFORMED, decode, numbered_lines
from opt.data.manifest import Origin

PUBLISHED = {"coco_captions": "coco", "vqa_v2": "coco", "nlvr2": "nlvr2", "visual_genome": "visual_genome",
             "conceptual_captions": "conceptual_captions"}  # fmt: skip
"""Sources that read one corpus."""
SPELLINGS = {"mscoco": "coco", "flick30k": "flickr30k"}
"""What Localized Narratives call corpora that have another name elsewhere."""
LOOKED_AT = 100
"""Lines of narrations, the first of which that is whole says the corpus."""


def origin_of(name: str, source: Source) -> Origin:
    """name: the source's module. Corpora of one's own are called after the layout and the folder or file."""
    if name == "karpathy":
        return Origin(str(vars(source)["dataset"]), source.split)
    if name == "localized_narratives":
        return Origin(_narrated(source) or _own(name, source), source.split)
    if name == "flickr_audio":
        return Origin("flickr8k" if source.files()[0].name.startswith("Flickr8k") else _own(name, source), source.split)
    return Origin(PUBLISHED.get(name) or _own(name, source), source.split)


def _narrated(source: Source) -> str:
    """The corpus that the narrations' `dataset_id` names less its split, open_images for open_images_train; else ""."""
    for _, line in islice(numbered_lines(source.files()[0]), LOOKED_AT):
        try:
            entry: Any = json.loads(decode(line))
            named = re.fullmatch(r"(\w+?)_(train|val|validation|test)(_?\w+)?", entry["dataset_id"].lower())
        except (*MALFORMED, AttributeError, KeyError, TypeError):
            continue
        return SPELLINGS.get(named[1], named[1]) if named else ""
    return ""


def _own(name: str, source: Source) -> str:
    return f"{name} {source.corpus.resolve().stem}"
