"""How new weights are drawn."""

from __future__ import annotations

from torch import nn

from opt.nn.block import Block, Stack
from opt.nn.embed import FrameEmbedder, PatchEmbedder, TextEmbedder
from opt.nn.heads import Projection
from opt.nn.multiway import MultiwayBlock, MultiwayStack


def normal(module: nn.Module) -> None:
    """BERT's and ViT's: normal with deviation 0.02, zero biases. For `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, PatchEmbedder | FrameEmbedder) and module.first is not None:
        nn.init.normal_(module.first, std=0.02)


def by_width(module: nn.Module) -> None:
    """CLIP's: deviations fall with the width, before residual sums with the depth as well; words 0.02, their positions
    0.01 (code of arXiv 2103.00020). For `Module.apply`."""
    if isinstance(module, Stack):
        for block in module.blocks:
            assert isinstance(block, Block)
            _block(block, (2 * len(module.blocks)) ** -0.5)
    elif isinstance(module, MultiwayStack):
        for block in module.blocks:
            assert isinstance(block, MultiwayBlock)
            _multiway(block, (2 * len(module.blocks)) ** -0.5)
    elif isinstance(module, TextEmbedder):
        nn.init.normal_(module.token.weight, std=0.02)
        if module.position is not None:
            nn.init.normal_(module.position.weight, std=0.01)
    elif isinstance(module, PatchEmbedder | FrameEmbedder):
        if module.position is not None:
            nn.init.normal_(module.position.weight, std=module.position.embedding_dim**-0.5)
        if module.first is not None:
            nn.init.normal_(module.first, std=module.first.shape[1] ** -0.5)
    elif isinstance(module, Projection):
        nn.init.normal_(module.linear.weight, std=module.linear.in_features**-0.5)


def _block(block: Block, deep: float) -> None:
    width = block.feed_norm.normalized_shape[0]
    for attention in (block.self_attention, block.writing_attention, block.cross_attention):
        if attention is not None:
            for linear, deviation in ((attention.query, 1.0), (attention.key_value, 1.0), (attention.output, deep)):
                nn.init.normal_(linear.weight, std=width**-0.5 * deviation)
                nn.init.zeros_(linear.bias)
    into, out = block.feed_forward[0], block.feed_forward[2]
    assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
    nn.init.normal_(into.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(out.weight, std=width**-0.5 * deep)


def _multiway(block: MultiwayBlock, deep: float) -> None:
    """Each expert as the sub-layer of a block that has but one."""
    attention = block.self_attention
    for experts, deviation in ((attention.query, 1.0), (attention.key_value, 1.0), (attention.output, deep)):
        for linear in experts.each.values():
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5 * deviation)
            nn.init.zeros_(linear.bias)
    for feed in block.feed_forward.each.values():
        assert isinstance(feed, nn.Sequential)
        into, out = feed[0], feed[-1]
        assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
        nn.init.normal_(into.weight, std=(2 * into.in_features) ** -0.5)
        nn.init.normal_(out.weight, std=into.in_features**-0.5 * deep)
