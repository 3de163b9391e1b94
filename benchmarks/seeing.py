"""What it takes to see a picture of 800 x 1333 pixels: a region detector against encoders of patches, in one run.

    python benchmarks/seeing.py [--repeats 5] [--threads 1]

All with random weights of full size (what they find takes some of the detector's time: 36 regions are kept), each from
the stored JPEG on, on the CPU, taking turns:

    regions      torchvision's Faster R-CNN with ResNet-50 and feature pyramid, as `opt extract --regions` runs it
    vilt         ViLT's picture part: 384 x 639 at most, patches of 32 pixels, through all twelve layers
    clip         ViT-B/16 on the middle square of 224 pixels
    albef        ViT-B/16 on 256 x 256 pixels

Prints one JSON line: medians in milliseconds, and `ratio_NAME`, how many times longer the detector takes.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from feature_extract.backends.torchvision_detector import TorchvisionDetector
from feature_extract.regions import RegionSettings
from opt.data.record import Picture, Sample
from opt.data.tokenizer import Tokenizer
from opt.systems.shared.towers import TowerSystem
from opt.systems.system import DataFacts, build, load

SIZE = (1333, 800)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    jpeg = photo()
    ways = {"regions": detector(jpeg), **{name: encoder(name, jpeg) for name in ("vilt", "clip", "albef")}}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats + 1):  # the first round warms up
        for name, see in ways.items():
            began = time.perf_counter()
            see()
            seconds[name].append(time.perf_counter() - began)
    found = {name: round(1000 * median(each[1:]), 1) for name, each in seconds.items()}
    ratios = {f"ratio_{name}": round(found["regions"] / value, 1) for name, value in found.items() if name != "regions"}
    print(json.dumps({"milliseconds": found, **ratios, "threads": given.threads, "repeats": given.repeats,
                      "torch": torch.__version__}))


def photo() -> bytes:
    """A made-up photo: smooth noise."""
    noise = np.random.default_rng(0).integers(256, size=(25, 42, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def detector(jpeg: bytes) -> Callable[[], Any]:
    network = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=800, max_size=1333)
    names = tuple(str(number) for number in range(90))
    extractor = TorchvisionDetector(network, names, "random", RegionSettings(min_regions=36))
    return lambda: extractor(Image.open(io.BytesIO(jpeg)).convert("RGB"))


@torch.inference_mode()
def encoder(name: str, jpeg: bytes) -> Callable[[], Any]:
    facts = DataFacts(0, (), 0, 0.0, 0)
    system = build(name, load(f"{name}.base").model, Tokenizer.train(["a red circle"] * 2, 60), facts).eval()
    assert isinstance(system, TowerSystem)
    sample = Sample("photo", (Picture(*SIZE, jpeg=jpeg),))

    def see() -> None:
        with torch.inference_mode():
            system.encode("image", system.preparer().inputs([sample], ["image"]))

    return see


if __name__ == "__main__":
    main()
