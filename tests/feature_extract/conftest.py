"""A made-up corpus in the Localized Narratives layout: drawn pictures, noise for speech."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw

PICTURES = 8


def write_corpus(folder: Path) -> list[dict]:
    """Eight pictures of growing width, nine narrations: picture 2 has two. Returns the lines."""
    (folder / "images").mkdir(parents=True)
    (folder / "voice" / "train").mkdir(parents=True)
    lines = []
    for number in [*range(PICTURES), 2]:
        rng = np.random.default_rng(number)
        picture = Image.new("RGB", (96 + 8 * number, 96), tuple(rng.integers(256, size=3).tolist()))
        ImageDraw.Draw(picture).ellipse((20, 20, 50 + number, 60), fill="red")
        picture.save(folder / "images" / f"p{number}.jpg", quality=92)
        recording = f"train/r{len(lines)}.flac"
        noise = rng.normal(scale=0.1, size=8000 + 1600 * number)
        soundfile.write(folder / "voice" / recording, noise, 16_000)
        lines.append({"dataset_id": "made_up", "image_id": f"p{number}", "annotator_id": len(lines), "traces": [[]],
                      "caption": f"Telling {len(lines)} of picture {number}.", "timed_caption": [],
                      "voice_recording": recording})
    write_lines(folder, lines)
    return lines


def write_lines(folder: Path, lines: list[dict], split: str = "train") -> None:
    (folder / f"{split}_localized_narratives.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    write_corpus(folder)
    return folder
