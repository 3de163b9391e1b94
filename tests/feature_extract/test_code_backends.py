"""Image codes by our discrete VAE and by DALL-E's tokenizer: pictures to codes and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor

from feature_extract.audio import AudioSettings
from feature_extract.codes import CodeSettings
from feature_extract.extractors import open_extractors, reopen
from feature_extract.regions import RegionSettings
from feature_extract.tiny import weights_file
from opt.config import UserError, to_dict
from opt.nn.dalle import DALLE, DALLEConfig
from opt.nn.dvae import DiscreteVAE, DiscreteVAEConfig

PICTURE = Image.fromarray(np.random.default_rng(0).integers(256, size=(120, 160, 3), dtype=np.uint8))


@pytest.fixture(params=["dvae", "dalle"])
def word(request, tmp_path) -> str:
    """A small untrained network of either kind in a file, as the command line names it."""
    path: Path = tmp_path / "codes.safetensors"
    torch.manual_seed(0)
    if request.param == "dvae":
        network = DiscreteVAE(DiscreteVAEConfig(codebook=32, widths=(8, 8, 8)))
        weights_file.write(path, network, to_dict(network.config))
    else:
        dalle = DALLE(DALLEConfig(codebook=32, width=8, decoder_width=8, blocks=1))
        for parameter in dalle.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        save_file(dalle.state_dict(), path, {"config": json.dumps(to_dict(dalle.config))})
    return f"{request.param}:{path}"


def open_codes(word: str, grid: int = 8) -> Any:
    return open_extractors("none", "none", word, RegionSettings(), AudioSettings(), "cpu", CodeSettings(grid))


@pytest.mark.parametrize("grid", [8, 14, 3])
def test_codes_are_the_networks_for_the_squeezed_picture(word, grid):
    codes = open_codes(word, grid).codes
    found = codes(PICTURE)
    assert found.shape == (grid, grid) and found.dtype == np.int16
    assert 0 <= found.min() <= found.max() < codes.codebook == 32
    pixels = pil_to_tensor(PICTURE.resize((8 * grid, 8 * grid), Image.Resampling.BICUBIC))[None].float() / 255
    np.testing.assert_array_equal(found, codes.dvae.encode(pixels)[0].numpy())
    assert len(np.unique(found)) > 1
    assert codes.decode(found[None])[0].size == (8 * grid, 8 * grid)


def test_pictures_come_back_each_as_it_would_alone(word):
    codes = open_codes(word).codes
    grids = np.random.default_rng(0).integers(32, size=(5, 8, 8), dtype=np.int16)
    together = codes.decode(grids)
    for grid, picture in zip(grids, together, strict=True):
        assert picture.size == (64, 64) and picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(codes.decode(grid[None])[0]))
        drawn = codes.dvae.decode(torch.from_numpy(grid[None].astype(np.int64)))[0].permute(1, 2, 0) * 255
        assert np.abs(np.asarray(picture) - drawn.detach().numpy()).max() <= 0.51
    assert codes.decode(grids[:0]) == []


def test_many_pictures_are_drawn_in_the_memory_of_one(word):
    codes, seen = open_codes(word).codes, []
    codes.dvae.decoder.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    assert len(codes.decode(np.zeros((300, 8, 8), np.int16))) == 300
    assert set(seen) == {1}


def test_codes_are_opened_again_from_what_they_say_of_themselves(word):
    first = open_codes(word)
    about = first.describe()
    assert about["codes"]["settings"] == {}  # as in shards that were made before there were other grids
    np.testing.assert_array_equal(reopen(about, "cpu").codes(PICTURE), first.codes(PICTURE))
    fine = open_codes(word, 14).describe()
    assert fine["codes"]["settings"] == {"codes_grid": 14} and reopen(fine, "cpu").codes(PICTURE).shape == (14, 14)
    about["codes"]["weights_sha256"] = "0" * 64
    with pytest.raises(UserError, match="not those that made the shards"):
        reopen(about, "cpu")


@pytest.mark.parametrize("backend", ["dvae", "dalle"])
@pytest.mark.parametrize("content", [None, b"nothing"])
def test_other_files_are_a_sentence(tmp_path, backend, content):
    path = tmp_path / "codes.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"not a discrete VAE of ours|not DALL-E's tokenizer"):
        open_codes(f"{backend}:{path}")
