"""Packed tokens against padding: one training step of the same encoder blocks on the same sequences.

    python benchmarks/packed.py [--quick]

Baseline `padded`: every sequence filled up to the longest of the batch, as a dense (B, L, D) encoder computes it; the
same weights, precision and loss. Sequences are those of OPT's rows: fused triples and each modality alone. Prints one
JSON line: `speedup` = padded seconds / packed seconds, and the share of padding in the baseline.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch

from opt.data.layout import AttentionLayout, self_layout
from opt.nn.block import Stack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: under a minute on 2 cores")
    repetitions = 5 if parser.parse_args().quick else 20
    rng, width, samples = np.random.default_rng(0), 192, 48
    words, regions, frames = (rng.integers(low, high, samples) for low, high in ((8, 20), (4, 13), (25, 50)))
    lengths = np.concatenate([words + regions + frames, words, regions + 1, frames + 1])
    padded = np.full_like(lengths, lengths.max())
    torch.manual_seed(0)
    stack = Stack(4, width, 4, 4 * width, 0.0)
    bfloat16 = torch.cpu._is_avx512_bf16_supported()
    times: dict[str, list[float]] = {"packed": [], "padded": []}
    for _ in range(repetitions + 2):  # the first two warm up
        for name, sizes in (("packed", lengths), ("padded", padded)):
            times[name].append(_step(stack, torch.randn(int(sizes.sum()), width), self_layout(sizes), bfloat16))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    print(json.dumps({
        "speedup": round(medians["padded"] / medians["packed"], 3), "baseline": "padded to the longest",
        "packed_seconds": round(medians["packed"], 4), "padded_seconds": round(medians["padded"], 4),
        "padding_share": round(1 - lengths.sum() / padded.sum(), 3), "bfloat16": bfloat16,
    }))


def _step(stack: Stack, hidden: torch.Tensor, layout: AttentionLayout, bfloat16: bool) -> float:
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output = stack(hidden, layout)
    output.float().square().mean().backward()
    stack.zero_grad(set_to_none=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
