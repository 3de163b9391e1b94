"""CLIPScore: how well a picture fits its caption by a CLIP checkpoint of the user's (Hessel et al. 2021, section 3).

    picture --CLIP--> unit vector --.
                                     cosine --> 2.5 max(cosine, 0), a mean over pictures
    "A photo depicts" + caption --> unit vector

torchmetrics' 100 max(cosine, 0), without the prompt, is another figure. Shape legend: B pictures or captions, E width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.pictures.gallery import GENERATED, KINDS, Judged, Seen, squeezed
from eval.result import Metric, measured
from eval.task import Task
from feature_extract.description import weights_sha256
from opt.config import UserError

NAME = "text_to_image.clip_score"
WEIGHT, PROMPT = 2.5, "A photo depicts "
HOW_TO_GET = "--clip FOLDER gives it, FOLDER a CLIP checkpoint as transformers has it, such as clip-vit-base-patch32"
BATCH = 64


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its own preparation of pictures and words; `name` says which, with a hash of its weights."""

    name: str
    model: Any
    pictures: Any
    words: Any

    @torch.inference_mode()
    def see(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors (B, E) float32 of RGB pictures, squeezed to 64 x 64 pixels and then prepared as CLIP asks."""
        pixels = self.pictures([squeezed(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
        return _unit(self.model.get_image_features(pixel_values=pixels.to(self.model.device)))

    @torch.inference_mode()
    def read(self, captions: Sequence[str]) -> np.ndarray:
        """Unit vectors (B, E) float32 of captions behind the prompt, cut to what the model reads."""
        texts = [PROMPT + caption for caption in captions]
        ids = self.words(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        inputs = {name: ids[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return _unit(self.model.get_text_features(**inputs))

    def cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than the model reads."""
        return sum(len(ids) > self.longest for ids in self.words([PROMPT + one for one in captions])["input_ids"])

    @property
    def longest(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)


def open_clip(folder: Path, device: str = "cpu") -> Clip:
    """Open a folder with config.json, weights, tokenizer and preprocessor_config.json; nothing is fetched or run.

    Raises UserError for a folder that holds no such checkpoint, or one with weights missing.
    """
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--clip {folder}: expected a folder with a CLIP checkpoint, its config.json first of all; "
                        f"{HOW_TO_GET}") from error  # fmt: skip
    if kind != "clip":
        raise UserError(f"--clip {folder}: holds a model of type {kind}, not clip; {HOW_TO_GET}")
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # what is missing is said below, in a sentence
    logging.disable_progress_bar()
    try:
        opened: Any = CLIPModel.from_pretrained(
            folder, local_files_only=True, weights_only=True, dtype=torch.float32, output_loading_info=True
        )
        pictures = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each of the three fails in its own ways
        raise UserError(f"--clip {folder}: could not be opened ({str(error).strip().splitlines()[0]})") from error
    model, loaded = opened
    if missing := sorted(loaded["missing_keys"]) or sorted(map(str, loaded["mismatched_keys"])):
        raise UserError(f"--clip {folder}: its weights lack {missing[0]}")
    model = model.eval().requires_grad_(False).to(device)
    return Clip(f"CLIP {folder.resolve().name}, SHA-256 {weights_sha256(model)[:12]}", model, pictures, words)


class ClipScore:
    """The judge that asks CLIP how well pictures fit their captions."""

    def __init__(self, task: Task, numbers: np.ndarray, clip: Clip, drawn: str) -> None:
        self.task, self.clip, self.drawn = task, clip, drawn
        captions = [task.split.captions[number] or "" for number in numbers.tolist()]
        vectors = [clip.read(captions[first : first + BATCH]) for first in range(0, len(captions), BATCH)]
        self.captions = dict(zip(numbers.tolist(), np.concatenate(vectors), strict=True))
        self.cut = clip.cut(captions)
        self.pictures: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in KINDS}

    def look(self, kind: str, seen: Sequence[Seen]) -> None:
        vectors = self.clip.see([one.picture for one in seen])
        self.pictures[kind] |= dict(zip((one.number for one in seen), vectors, strict=True))

    def judged(self) -> Judged:
        metrics = [self._metric(kind, vectors) for kind, vectors in self.pictures.items() if vectors]
        missing = [NAME + kind for kind, vectors in self.pictures.items() if not vectors]
        return Judged(metrics, dict.fromkeys(missing, "no picture of this kind"))

    def _metric(self, kind: str, vectors: dict[int, np.ndarray]) -> Metric:
        numbers = np.array(list(vectors))
        return measured(
            NAME + kind,
            self._scores(vectors, numbers),
            self.task.provenance.seed,
            chance=float(self._scores(vectors, self.task.strangers(numbers)).mean()),
            chance_method="the same pictures, captions of others",
            unit="score",
            protocol="clip-score/hessel",
            modalities=("text",) if kind == GENERATED else ("image",),
            direction="text -> image",
            normaliser=f'caption behind "{PROMPT.strip()}"; pictures squeezed to 64 x 64, then as CLIP prepares them',
            note=f"2.5 max(cosine, 0); {self.clip.name}; {self.cut} of {len(self.captions)} captions are longer than "
            f"the {self.clip.longest} tokens that it reads" + (f"; {self.drawn}" if kind == GENERATED else ""),
        )

    def _scores(self, vectors: dict[int, np.ndarray], captions: np.ndarray) -> np.ndarray:
        """(N,) float64: each picture with the caption of the sample named at its place."""
        pairs = zip(vectors.values(), captions.tolist(), strict=True)
        return np.array([WEIGHT * max(0.0, float(vector @ self.captions[caption])) for vector, caption in pairs])


def without_clip() -> dict[str, str]:
    """Why the figure is absent where no checkpoint was given."""
    return {NAME: HOW_TO_GET}


def _unit(output: Any) -> np.ndarray:
    vectors = output.pooler_output
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
