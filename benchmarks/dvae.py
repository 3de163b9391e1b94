"""How well 64 codes tell a held-out picture, and how many codes are used, against training steps of the dVAE.

    python benchmarks/dvae.py --shards runs/flickr/shards/train --test runs/flickr/shards/test --out runs/dvae/flickr

Trains by `opt pretrain`'s trainer in the run's folder (the same command goes on after a stop) and evaluates each state
it kept. Baselines on the same pictures, without learning: `mean_colour` (one colour a picture), `small_picture`
(squeezed to 8 x 8 pixels and back: 192 bytes), and `embedded` (the embedded network of 512 codes, which saw drawn
scenes alone). Prints one JSON line. --picture also writes originals over reconstructions of the last state.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from feature_extract.backends.dvae import load as load_codes
from feature_extract.codes import CodeSettings
from opt.checkpoint import from_pretrained
from opt.data.plan import BatchPlan
from opt.data.shards import ShardReader
from opt.nn.dvae import DiscreteVAE
from opt.recipe import LoopConfig
from opt.systems.dvae import DVAE, Pixels
from opt.systems.system import load
from pretrain.run import PretrainConfig, pretrain
from pretrain.state import load_state

POINTS = 5
"""States kept on the way, at equal distances."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="pictures to train on")
    parser.add_argument("--test", type=Path, required=True, help="held-out pictures")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--preset", default="dvae.tiny", help="dvae.tiny or dvae.base")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--picture", type=Path, help="a PNG to write")
    options = parser.parse_args()
    run = _config(options)
    pretrain(run)
    pixels = _pictures(ShardReader(options.test))
    dvae = from_pretrained(options.out / "model")
    assert isinstance(dvae, DVAE)
    points = []
    for path in sorted((options.out / "checkpoints").glob("step-*")):
        state = {"model": dvae.state_dict()}
        load_state(path, state)
        dvae.load_state_dict(state["model"])
        points.append({"steps": int(path.name.removeprefix("step-")), **_told_in_codes(dvae.dvae, pixels)})
    embedded = load_codes("tiny", CodeSettings(), "cpu").dvae
    assert isinstance(embedded, DiscreteVAE)
    if options.picture is not None:
        _draw(dvae.dvae, pixels[:8], options.picture)
    print(json.dumps({
        "psnr": points[-1]["psnr"], "codes_used": points[-1]["codes_used"], "codebook": dvae.config.codebook,
        "preset": options.preset, "parameters": sum(parameter.numel() for parameter in dvae.parameters()),
        "train_pictures": len(ShardReader(options.shards)), "test_pictures": len(pixels),
        "pictures_a_step": run.loop.batch_tokens // 64, "points": points,
        "baselines": {"mean_colour": _psnr(pixels.mean((2, 3), keepdim=True).expand_as(pixels), pixels),
                      "small_picture": _psnr(_squeezed(pixels), pixels),
                      "embedded": _told_in_codes(embedded, pixels)},
    }))


def _config(options: argparse.Namespace) -> PretrainConfig[Any]:
    """The preset's own settings, but for the steps and the states kept."""
    preset = load(options.preset)
    loop = LoopConfig(steps=options.steps, batch_tokens=preset.loop.batch_tokens, workers=1, log_every=50,
                      save_every=max(1, options.steps // POINTS), keep=POINTS + 1)
    shards = (str(options.shards),)
    return PretrainConfig(options.preset, shards, options.out, preset.model, loop=loop, optim=preset.optim)


def _pictures(reader: ShardReader) -> Tensor:
    """Every distinct picture as training sees it: (B, 3, 64, 64) in [0, 1]."""
    _, numbers = np.unique(reader.key_hash, return_index=True)
    none = np.zeros(len(numbers), np.int64)
    plan = BatchPlan(np.sort(numbers), none, np.full((len(numbers), 2), -1), none.astype(np.uint64), 0, 0, 0)
    batch = Pixels()({int(number): reader.sample(int(number), jpeg=True) for number in numbers}, plan)
    return batch.extra["pixels"].float() / 255


@torch.inference_mode()
def _told_in_codes(dvae: DiscreteVAE, pixels: Tensor) -> dict[str, float]:
    """PSNR of what the likeliest codes give, how many different ones all pictures use, and their perplexity."""
    codes = torch.cat([dvae.encode(part) for part in pixels.split(50)])
    drawn = torch.cat([dvae.decode(part) for part in codes.split(50)])
    share = torch.bincount(codes.flatten()).float() / codes.numel()
    perplexity = math.exp(-float(torch.special.xlogy(share, share).sum()))
    return {"psnr": _psnr(drawn, pixels), "codes_used": len(codes.unique()), "perplexity": round(perplexity, 1)}


def _psnr(drawn: Tensor, pixels: Tensor) -> float:
    """Decibels, the mean over pictures."""
    return round(float((-10 * (drawn - pixels).square().mean((1, 2, 3)).log10()).mean()), 2)


def _squeezed(pixels: Tensor) -> Tensor:
    """Each picture as 8 x 8 pixels, blown up again."""
    small = torch.nn.functional.interpolate(pixels, (8, 8), mode="area")
    return torch.nn.functional.interpolate(small, pixels.shape[2:], mode="bicubic").clamp(0, 1)


@torch.inference_mode()
def _draw(dvae: DiscreteVAE, pixels: Tensor, path: Path) -> None:
    """Originals over what their codes give, twice enlarged."""
    rows = torch.stack([pixels, dvae.decode(dvae.encode(pixels))])
    sheet = (255 * rows).round().to(torch.uint8).permute(0, 3, 1, 4, 2).reshape(128, -1, 3).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize((2 * sheet.shape[1], 256), Image.Resampling.NEAREST).save(path, optimize=True)


if __name__ == "__main__":
    main()
