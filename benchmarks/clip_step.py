"""A training step of CLIP out of our blocks against open_clip's own, in one run: images a second.

    python benchmarks/clip_step.py [--quick] [--model ViT-S-32] [--batch 32] [--repeats 7] [--threads 2]

Both sides have the sizes of one of open_clip's configurations (equal numbers of parameters), the same pictures and
captions, the same precision, fused AdamW, and a contrast of their own: open_clip.CLIP with ClipLoss, clip_model.py with
opt.objectives.contrastive. They take turns step by step, each with the better of 1 and `threads` threads; figures are
of the median step.

    ratio             our images a second over theirs, bfloat16 autocast, captions of 14 tokens in the median
                      (log-normal with deviation 0.5, from 5 to 77). open_clip fills every caption up to 77
    ratio_full_text   the same when all 77 tokens of every caption are real: nothing to be left out

Both again in float32, as ratio_float32 and ratio_full_text_float32. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from clip_model import CLIP, Tower, pack
from torch import Tensor, nn
from turns import Side, over, take_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bfloat16 alone, 3 repeats of a batch of 16")
    parser.add_argument("--model", default="ViT-S-32", help="one of open_clip's configurations of a plain CLIP")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a picture and a caption")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each side")
    parser.add_argument("--threads", type=int, default=2, help="most threads of a side")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.repeats = 16, 3
    print(json.dumps(measure(options)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the JSON line says."""
    package, device = importlib.import_module("open_clip"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = package.get_model_config(options.model)
    torch.manual_seed(0)
    models = {"ours": like(config).to(device), "open_clip": package.CLIP(**config).to(device)}
    losses = {"ours": models["ours"].loss, "open_clip": contrast(models["open_clip"], package.ClipLoss())}
    parameters = {who: sum(parameter.numel() for parameter in model.parameters()) for who, model in models.items()}
    ratios, steps = {}, {}
    for precision in ("bfloat16",) if options.quick else ("bfloat16", "float32"):
        for full in (False, True):
            batches, words = made_up(config, options.batch, full, device)
            sides = {who: Side("", {"": stepper(model, losses[who], precision == "bfloat16", device)}, [batches[who]],
                               {"tokens": [words], "samples": [options.batch]}, [1.0], parameters[who])
                     for who, model in models.items()}
            take_turns(sides, options.repeats, options.threads, device)
            name = "_full_text" * full + "_float32" * (precision == "float32")
            ratios[f"ratio{name}"] = over(sides["ours"], sides["open_clip"], "samples")
            ratios[f"ratio{name}_by_cpu_seconds"] = over(sides["ours"], sides["open_clip"], "samples", "cpu")
            steps[f"steps{name}"] = {who: figures(side) for who, side in sides.items()}
    return {**ratios, "parameters": parameters, "batch": options.batch, **steps, "model": options.model,
            "repeats": options.repeats, "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "torch": torch.__version__, "open_clip": package.__version__}


def figures(side: Side) -> dict[str, Any]:
    """What the JSON line says of a side."""
    kept = ("samples_per_second", "step_seconds", "step_cpu_seconds", "threads")
    return {**{key: value for key, value in side.figures().items() if key in kept}, "words": side.amounts["tokens"][0]}


def like(config: dict[str, Any]) -> CLIP:
    """Ours with the sizes of an open_clip configuration, whose vision heads are 64 wide."""
    seen, read = config["vision_cfg"], config["text_cfg"]
    return CLIP(Tower(seen["width"], seen["layers"], seen["width"] // 64),
                Tower(read["width"], read["layers"], read["heads"]), seen["image_size"], seen["patch_size"],
                read["vocab_size"], read["context_length"], config["embed_dim"])


def made_up(config: dict[str, Any], pairs: int, full: bool, device: torch.device) -> tuple[dict[str, Any], int]:
    """A batch as each side takes it, and its real words. full: as many as the context holds.

    A caption ends in the word of the highest number, by which open_clip finds its end, and 0 fills it up.
    """
    rng, text = np.random.default_rng(0), config["text_cfg"]
    longest, vocabulary, image = text["context_length"], text["vocab_size"], config["vision_cfg"]["image_size"]
    lengths = np.clip(rng.lognormal(np.log(14), 0.5, pairs), 5, longest).astype(int)
    captions = [np.append(rng.integers(1, vocabulary - 1, longest - 1 if full else length - 1), vocabulary - 1)
                for length in lengths]
    words_BL = torch.zeros(pairs, longest, dtype=torch.int64)
    for row_L, caption in zip(words_BL, captions, strict=True):
        row_L[: len(caption)] = torch.from_numpy(caption)
    pixels = torch.from_numpy(rng.normal(size=(pairs, 3, image, image)).astype(np.float32))
    packed = pack(pixels, captions, config["vision_cfg"]["patch_size"]).to(device)
    return {"ours": packed, "open_clip": (pixels.to(device), words_BL.to(device))}, packed.tokens


def contrast(model: nn.Module, loss: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """open_clip's loss of (pixels, words), as its training script takes it."""
    return lambda batch: loss(*model(*batch))


def stepper(model: nn.Module, loss: Callable[[Any], Tensor], bfloat16: bool, device: torch.device
            ) -> Callable[[Any], None]:
    """A training step of either side: both scales are kept at most 100 after it."""
    parameters = list(model.parameters())
    scale = next(parameter for parameter in parameters if parameter.numel() == 1)
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.2},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), fused=True)

    def step(batch: Any) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            scale.clamp_(0.0, math.log(100.0))

    return step


if __name__ == "__main__":
    main()
