"""BEiT v2's tokenizer from its authors' layout: the codes of a plain computation, nothing missing, nothing unknown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from feature_extract.audio import AudioSettings
from feature_extract.codes import CodeSettings
from feature_extract.extractors import open_extractors, reopen
from feature_extract.regions import RegionSettings
from opt.config import UserError
from opt.weights.vqkd import load

WIDTH, INNER, LAYERS, HEADS, GRID, PATCH, CODES, CODE_WIDTH = 128, 256, 3, 2, 5, 4, 40, 8
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def published() -> State:
    """Random weights under the authors' names, with what training alone needs."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(*shape, generator=draw)

    state = {"encoder.cls_token": some(1, 1, WIDTH), "encoder.pos_embed": some(1, 1 + GRID**2, WIDTH, scale=1),
             "encoder.patch_embed.proj.weight": some(WIDTH, 3, PATCH, PATCH),
             "encoder.patch_embed.proj.bias": some(WIDTH),
             "encoder.fc_norm.weight": 1 + some(WIDTH), "encoder.fc_norm.bias": some(WIDTH)}  # fmt: skip
    for number in range(LAYERS):
        own = f"encoder.blocks.{number}."
        for norm in ("norm1", "norm2"):
            state |= {f"{own}{norm}.weight": 1 + some(WIDTH), f"{own}{norm}.bias": some(WIDTH)}
        state |= {f"{own}attn.q_bias": some(WIDTH), f"{own}attn.v_bias": some(WIDTH),
                  f"{own}attn.qkv.weight": some(3 * WIDTH, WIDTH)}
        for name, wide, narrow in (("attn.proj", WIDTH, WIDTH), ("mlp.fc1", INNER, WIDTH), ("mlp.fc2", WIDTH, INNER)):
            state |= {f"{own}{name}.weight": some(wide, narrow), f"{own}{name}.bias": some(wide)}
    for name, wide in (("0", WIDTH), ("2", CODE_WIDTH)):
        state |= {f"encode_task_layer.{name}.weight": some(wide, WIDTH), f"encode_task_layer.{name}.bias": some(wide)}
    state["quantize.embedding.weight"] = F.normalize(some(CODES, CODE_WIDTH), dim=-1)
    for name in ("quantize.cluster_size", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg",
                 "quantize.embedding.initted", "decoder.cls_token", "decoder.blocks.0.norm1.weight",
                 "decode_task_layer.0.weight", "teacher_model.proj", "scaling_layer.shift"):
        state[name] = some(3)
    return state


def plainly(state: State, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What codes are chosen by (B, g g, 8), and codes (B, g, g), of pixels in [0, 1] with nothing of ours."""
    hidden = F.conv2d(2 * pixels - 1, state["encoder.patch_embed.proj.weight"], state["encoder.patch_embed.proj.bias"],
                      stride=PATCH).flatten(2).transpose(1, 2)
    hidden = torch.cat([state["encoder.cls_token"].expand(len(pixels), -1, -1), hidden], 1) + state["encoder.pos_embed"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for number in range(LAYERS):
        own = f"encoder.blocks.{number}."
        bias = torch.cat([state[f"{own}attn.q_bias"], torch.zeros(WIDTH), state[f"{own}attn.v_bias"]])
        parts = norm(hidden, f"{own}norm1") @ state[f"{own}attn.qkv.weight"].T + bias
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts.chunk(3, -1))
        weight = (query @ key.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        hidden = hidden + linear((weight @ value).transpose(1, 2).flatten(2), f"{own}attn.proj")
        hidden = hidden + linear(F.gelu(linear(norm(hidden, f"{own}norm2"), f"{own}mlp.fc1")), f"{own}mlp.fc2")
    seen = linear(norm(hidden[:, 1:], "encoder.fc_norm"), "encode_task_layer.0").tanh()
    seen = F.normalize(linear(seen, "encode_task_layer.2"), dim=-1)
    distance = (seen[:, :, None] - state["quantize.embedding.weight"]).square().sum(-1)
    return seen, distance.argmin(-1).unflatten(1, (GRID, GRID))


@torch.inference_mode()
def test_codes_are_those_of_the_plain_computation(published: State, tmp_path: Path) -> None:
    torch.save({"model": published, "epoch": 3}, tmp_path / "vqkd.pth")
    network = load(tmp_path / "vqkd.pth")
    assert (network.config.heads, network.config.grid, network.config.patch) == (HEADS, GRID, PATCH)
    pixels = torch.randint(256, (6, 3, GRID * PATCH, GRID * PATCH), dtype=torch.uint8)
    seen, codes = plainly(published, pixels / 255)
    torch.testing.assert_close(network.features(pixels), seen, atol=2e-5, rtol=0)
    assert torch.equal(network.encode(pixels), codes) and len(codes.unique()) > 5
    assert torch.equal(network.encode(pixels[2:3]), codes[2:3])


def extractors(path: Path, grid: int):
    return open_extractors("none", "none", f"vqkd:{path}", RegionSettings(), AudioSettings(), "cpu", CodeSettings(grid))


def test_the_extractor_squeezes_the_picture_and_draws_none(published: State, tmp_path: Path) -> None:
    path = tmp_path / "vqkd.pth"
    torch.save({"model": published}, path)
    first = extractors(path, GRID)
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(30, 70, 3), dtype=np.uint8))
    found = first.codes(picture)
    assert found.shape == (GRID, GRID) and found.dtype == np.int16 and first.codes.codebook == CODES
    squeezed = pil_to_tensor(picture.resize((GRID * PATCH, GRID * PATCH), Image.Resampling.BICUBIC))[None] / 255
    np.testing.assert_array_equal(found, plainly(published, squeezed)[1][0])
    about = first.describe()
    assert about["codes"]["settings"] == {"codes_grid": GRID} and about["codes"]["backend"] == "vqkd"
    np.testing.assert_array_equal(reopen(about, "cpu").codes(picture), found)
    with pytest.raises(UserError, match="not for pixels, so no picture can be drawn"):
        first.codes.decode(found[None])
    with pytest.raises(UserError, match=f"--codes-grid 8: .* in {GRID} x {GRID} codes, .* give --codes-grid {GRID}"):
        extractors(path, 8)


def drop(*names: str) -> Callable[[State], object]:
    return lambda state: [state.pop(name) for name in names]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("encoder.blocks.1.attn.v_bias", "encode_task_layer.2.bias"),
         "holds no encode_task_layer.2.bias, encoder.blocks.1.attn.v_bias, which"),
        (lambda state: [state.pop(name) for name in list(state) if name.startswith("encoder.")],
         r"holds no encoder.cls_token, encoder.pos_embed, .* and \d+ more, which VQ-KD's encoder has"),
        (lambda state: state.update({"encoder.rel_pos_bias.relative_position_bias_table": torch.zeros(3, 2)}),
         "holds encoder.rel_pos_bias.relative_position_bias_table, which VQ-KD's encoder has not"),
        (lambda state: state.update({"encoder.blocks.0.gamma_1": torch.ones(WIDTH)}), "holds encoder.blocks.0.gamma_1"),
        (lambda state: state.update({"encoder.fc_norm.bias": torch.zeros(3)}), "do not make VQ-KD's encoder"),
        (lambda state: state.update({"encoder.pos_embed": torch.zeros(1, 23, WIDTH)}), "do not make VQ-KD's encoder"),
        (lambda state: state.update({"encoder.blocks.0.attn.qkv.weight": torch.zeros(WIDTH, WIDTH)}), "do not make"),
        (lambda state: state.update({"encoder.patch_embed.proj.weight": torch.zeros(WIDTH + 1, 3, PATCH, PATCH)}),
         "width 129 is no multiple of 64"),
        (lambda state: state.update({"quantize.embedding.weight": torch.zeros(CODES)}), "do not make VQ-KD's encoder"),
    ],
)
def test_what_is_no_published_tokenizer_is_said_with_names(published: State, tmp_path: Path, change, said) -> None:
    state = dict(published)
    change(state)
    torch.save({"model": state}, tmp_path / "vqkd.pth")
    with pytest.raises(UserError, match=said):
        load(tmp_path / "vqkd.pth")
    with pytest.raises(UserError, match="gone does not exist"):
        load(tmp_path / "gone")
