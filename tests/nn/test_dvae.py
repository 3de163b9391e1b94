"""The discrete VAE: shapes, the code grid, what its two losses reward."""

import math

import pytest
import torch

from opt.nn.dvae import DiscreteVAE, DiscreteVAEConfig, place_divergence, usage_divergence


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


def test_divergences_are_zero_for_even_use_and_log_of_the_codebook_for_one_code():
    logits = torch.zeros(2, 16, 8, 8)
    assert usage_divergence(logits).item() == pytest.approx(0, abs=1e-5)
    assert place_divergence(logits).abs().max().item() == pytest.approx(0, abs=1e-5)
    logits[:, 3] = 50
    assert usage_divergence(logits).item() == pytest.approx(math.log(16), abs=1e-4)
    torch.testing.assert_close(place_divergence(logits), torch.full((2, 8, 8), math.log(16)))


def test_sure_places_that_share_the_codebook_evenly_differ_in_the_two_divergences():
    logits = torch.zeros(1, 16, 8, 8).scatter_(1, torch.arange(64).remainder(16).view(1, 1, 8, 8), 50.0)
    assert usage_divergence(logits).item() == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(place_divergence(logits), torch.full((1, 8, 8), math.log(16)))


def test_place_divergence_is_torchs_kl(dvae: DiscreteVAE):
    logits = dvae.logits(torch.rand(2, 3, 64, 64))
    chosen = torch.distributions.Categorical(logits=logits.permute(0, 2, 3, 1))
    even = torch.distributions.Categorical(logits=torch.zeros(16))
    torch.testing.assert_close(place_divergence(logits), torch.distributions.kl_divergence(chosen, even))


def test_the_gradient_reaches_the_encoder_through_soft_codes(dvae: DiscreteVAE):
    """Against a finite difference, with the same Gumbel noise: soft weights have an exact gradient."""
    dvae, pixels = dvae.double(), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    last = dvae.encoder[-1]
    assert isinstance(last, torch.nn.Conv2d)

    def error() -> torch.Tensor:
        torch.manual_seed(1)
        drawn, logits = dvae(pixels, 0.5)
        return (drawn - pixels).square().sum()

    dvae.pixels = lambda weights: dvae.decoder(weights.double()).sigmoid()  # the noise is drawn in float32
    error().backward()
    gradient, step = last.bias.grad.clone(), 1e-2
    with torch.no_grad():
        last.bias[5] += step
        above = error()
        last.bias[5] -= 2 * step
        below = error()
    assert gradient[5].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=2e-2)


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
