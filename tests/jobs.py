"""Extraction jobs for tests: a made-up corpus, a job over it with the embedded networks, all that it left."""

import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from feature_extract.audio import AudioSettings
from feature_extract.codes import CodeSettings
from feature_extract.options import ExtractConfig
from feature_extract.regions import RegionSettings
from feature_extract.sources.localized_narratives import Source

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


def config(corpus: Path, out: Path, **more) -> ExtractConfig:
    """The made-up corpus in shards of three rows, by this process; `more` are fields of the job or its settings."""
    settings = {"shard_size": 3, "workers": 0, "device": "cpu"} | more
    parts = {"region": RegionSettings, "speech": AudioSettings, "image_codes": CodeSettings}
    for name, kind in parts.items():
        own = {key: settings.pop(key) for key in list(settings) if key in kind.__dataclass_fields__ and key != "codes"}
        settings[name] = kind(**own)
    return ExtractConfig("localized_narratives", Source(corpus, settings.pop("split", "train")), out, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished job but its locks, and its plan, which notes when the source's files were written."""
    left_out = {".lock", ".turn", "plan.sqlite"}
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in left_out}
