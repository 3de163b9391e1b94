"""Packed tokens against padding: one training step of the same encoder blocks on the same sequences.

    python benchmarks/packed.py [--quick]

Baseline `padded`: every sequence filled up to the longest of the batch, as a dense (B, L, D) encoder computes it; the
same weights, precision and loss. `fused`: packed, with torch's fused attention in every bucket, which products replace
on CPUs in bfloat16. Sequences are those of OPT's rows: fused triples and each modality alone.
Prints one JSON line: `speedup` = padded seconds / packed seconds, the share of padding in the baseline and in buckets,
and the share of filler in batches of 12,000 tokens, 15 % more or less, and how many sizes those come in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from opt.data.capacity import Filled
from opt.data.layout import AttentionLayout, self_layout
from opt.data.pack import Packer
from opt.nn import attention
from opt.nn.block import Stack
from opt.systems.dvae import Pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: under a minute on 2 cores")
    repetitions = 5 if parser.parse_args().quick else 20
    rng, width = np.random.default_rng(0), 192
    lengths = _sequences(rng, 48)
    sizes = {"packed": lengths, "fused": lengths, "padded": np.full_like(lengths, lengths.max())}
    torch.manual_seed(0)
    stack = Stack(4, width, 4, 4 * width, 0.0)
    bfloat16 = torch.cpu._is_avx512_bf16_supported()
    times: dict[str, list[float]] = {name: [] for name in sizes}
    for _ in range(repetitions + 2):  # the first two warm up
        for name, each in sizes.items():
            hidden, layout = torch.randn(int(each.sum()), width), self_layout(each)
            with patch.object(attention, "_attend_by_products", _fused if name == "fused" else PRODUCTS):
                times[name].append(_step(stack, hidden, layout, bfloat16))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    print(json.dumps({
        "speedup": round(medians["padded"] / medians["packed"], 3), "baseline": "padded to the longest",
        **{f"{name}_seconds": round(seconds, 4) for name, seconds in medians.items()},
        "padding_share": round(1 - lengths.sum() / sizes["padded"].sum(), 3),
        "bucket_padding_share": round(1 - lengths.sum() / self_layout(lengths).padded, 3),
        **_filler(rng), "bfloat16": bfloat16,
    }))


PRODUCTS = attention._attend_by_products


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, causal: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def _sequences(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Lengths of fused triples, then of each modality alone."""
    words, regions, frames = (rng.integers(low, high, samples) for low, high in ((8, 20), (4, 13), (25, 50)))
    return np.concatenate([words + regions + frames, words, regions + 1, frames + 1])


def _step(stack: Stack, hidden: torch.Tensor, layout: AttentionLayout, bfloat16: bool) -> float:
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output = stack(hidden, layout)
    output.float().square().mean().backward()
    stack.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def _filler(rng: np.random.Generator) -> dict[str, Any]:
    """Of a hundred batches as `opt.small` fills its 16,384 tokens, what compiled blocks compute too much."""
    filled, real, sizes = Filled(Pixels(), 16_384), 0, []
    for _ in range(100):
        packer = Packer(1, 1)
        for length in _sequences(rng, int(rng.integers(85, 115))):
            packer.sequence("encoder", [packer.text(np.zeros(length, np.int64))])
        batch = packer.batch([], {}, {}, {})
        real += batch.tokens
        sizes.append(filled.fill(batch).padded)
    return {"filler_share": round(1 - real / sum(sizes), 3), "sizes": len(set(sizes))}


if __name__ == "__main__":
    main()
