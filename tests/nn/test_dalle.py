"""DALL-E's architecture against the published package, by numbers."""

import pytest
import torch

from opt.nn.dalle import DALLE, DALLEConfig, map_pixels, unmap_pixels

dall_e = pytest.importorskip("dall_e")


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_as_many_and_of_the_same_shapes_as_the_published_ones():
    with torch.device("meta"):
        ours = DALLE(DALLEConfig())
    meta = torch.device("meta")
    for mine, theirs in ((ours.encoder, dall_e.Encoder(device=meta)), (ours.decoder, dall_e.Decoder(device=meta))):
        assert sorted(tuple(p.shape) for p in mine.parameters()) == sorted(tuple(p.shape) for p in theirs.parameters())
    assert count(ours.encoder) == pytest.approx(53.8e6, rel=1e-3)
    assert count(ours.decoder) == pytest.approx(43.8e6, rel=1e-3)


def test_pixels_are_mapped_as_the_published_ones():
    pixels = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(map_pixels(pixels), dall_e.map_pixels(pixels))
    torch.testing.assert_close(unmap_pixels(pixels), dall_e.unmap_pixels(pixels))
    torch.testing.assert_close(unmap_pixels(map_pixels(pixels)), pixels)


@torch.inference_mode()
def test_sides_shrink_eightfold_and_come_back():
    dalle = DALLE(DALLEConfig(codebook=32, width=8, decoder_width=8, blocks=1))
    codes = dalle.encode(torch.rand(2, 3, 64, 32))
    assert codes.shape == (2, 8, 4) and codes.dtype == torch.int64
    pixels = dalle.decode(codes)
    assert pixels.shape == (2, 3, 64, 32) and 0 <= pixels.min() <= pixels.max() <= 1
