"""Media files, the shards extracted from them and a model that reads both: for verbs that take a user's own files."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from fixtures import tokenizer
from PIL import Image, ImageDraw

from opt.checkpoint import save_pretrained
from opt.cli import main
from opt.data.shards import ShardReader
from opt.systems.system import DataFacts, build, load

COUNT = 3


def write_media(folder: Path) -> None:
    """Three drawn pictures with a synthesised recording each, in the Localized Narratives layout."""
    (folder / "images").mkdir(parents=True)
    (folder / "voice").mkdir()
    lines = []
    for number in range(COUNT):
        picture = Image.new("RGB", (96 + 16 * number, 96), ["white", "navy", "green"][number])
        ImageDraw.Draw(picture).ellipse((20, 20, 60, 50 + 10 * number), fill="red")
        picture.save(folder / "images" / f"p{number}.png")
        picture.save(folder / "images" / f"p{number}.jpg")
        tone = np.sin(np.arange(12_000) * (0.05 + 0.08 * number)) * np.linspace(0.1, 0.5, 12_000)
        soundfile.write(folder / "voice" / f"r{number}.wav", tone, 16_000)
        lines.append({"dataset_id": "made_up", "image_id": f"p{number}", "annotator_id": 0, "traces": [[]],
                      "caption": f"red circle {number}", "timed_caption": [], "voice_recording": f"r{number}.wav"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train_localized_narratives.jsonl").write_text(text)


def make_workshop(folder: Path) -> Path:
    """media/, their shards/, and model/, which was made for these shards."""
    write_media(folder / "media")
    arguments = ["extract", "localized_narratives", str(folder / "media"), "--out", str(folder / "shards")]
    assert main([*arguments, "--workers", "1"]) == 0
    manifest = ShardReader(folder / "shards").manifest
    torch.manual_seed(0)
    system = build("opt", load("opt.tiny").model, tokenizer(), DataFacts(
        manifest.region_width, manifest.region_classes, manifest.speech_width, manifest.frame_rate, manifest.codebook,
        manifest.extractors))
    with torch.no_grad():  # far from its beginning, so that what it sees changes what it says
        for parameter in system.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_pretrained(system, folder / "model")
    return folder
