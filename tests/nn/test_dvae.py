"""The discrete VAE: shapes, the code grid, what its two losses reward."""

import math

import pytest
import torch

from opt.nn.dvae import DiscreteVAE, DiscreteVAEConfig


@pytest.fixture
def dvae() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(DiscreteVAEConfig(codebook=16, widths=(8, 8, 16)))


def test_codes_and_pixels_have_their_shapes_and_ranges(dvae: DiscreteVAE):
    codes = dvae.encode(torch.rand(2, 3, 64, 64))
    assert codes.shape == (2, 8, 8)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 16
    pixels = dvae.decode(codes)
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_decoding_codes_is_decoding_their_one_hot_weights(dvae: DiscreteVAE):
    codes = torch.randint(16, (1, 8, 8))
    weights = torch.zeros(1, 16, 8, 8).scatter_(1, codes[:, None], 1.0)
    torch.testing.assert_close(dvae.decode(codes), dvae.pixels(weights))


def test_a_picture_is_encoded_alike_in_any_batch(dvae: DiscreteVAE):
    pixels = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(dvae.logits(pixels)[1:2], dvae.logits(pixels[1:2]), atol=1e-5, rtol=1e-5)


def test_divergence_is_zero_for_even_use_and_log_of_the_codebook_for_one_code(dvae: DiscreteVAE):
    pixels = torch.rand(2, 3, 64, 64)
    last = dvae.encoder[-1]
    assert isinstance(last, torch.nn.Conv2d) and last.bias is not None
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    assert dvae(pixels, 1.0)[1].item() == pytest.approx(0, abs=1e-5)
    last.bias.data[3] = 50
    assert dvae(pixels, 1.0)[1].item() == pytest.approx(math.log(16), abs=1e-4)


def test_it_learns_two_flat_pictures(dvae: DiscreteVAE):
    pixels = torch.stack([torch.full((3, 64, 64), 0.2), torch.full((3, 64, 64), 0.9)])
    optimizer = torch.optim.Adam(dvae.parameters(), 1e-2)
    for _ in range(40):
        loss = (dvae(pixels, 0.5)[0] - pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = dvae.eval().decode(dvae.encode(pixels))
    assert (drawn - pixels).square().mean().item() < 0.01
