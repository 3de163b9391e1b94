"""VLMo's image route begun from BEiT and ViT: states as transformers and timm have them at random weights."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import tokenizer
from PIL import Image

from opt.config import UserError
from opt.data.pixels import Sight
from opt.data.record import Picture, Sample
from opt.systems.beit3 import tiny as beit3_tiny
from opt.systems.shared.config import Sizes
from opt.systems.system import DataFacts, build
from opt.systems.vlmo import VLMo, VLMoConfig
from opt.weights import beit
from opt.weights.importing import NO_FEATURES
from opt.weights.source import Source
from pretrain.start import find_start

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

SIZE, PATCH, HEADS = 32, 8, 3
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-4}
CODED = DataFacts(region_width=0, region_classes=(), speech_width=0, frame_rate=0.0, codebook=64)


def loud(model: torch.nn.Module) -> Any:
    """Random weights, tables and factors, with norms and biases away from 1 and 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            strength = 1.0 if "position" in name or "_token" in name else 0.2 if parameter.ndim == 1 else 0.1
            parameter.add_(strength * torch.randn_like(parameter))
    return model.eval()


def of_transformers(*, kind: str = "Beit", model: str = "Model", **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": HEADS, "intermediate_size": 96,
             "image_size": SIZE, "patch_size": PATCH, "layer_norm_eps": 1e-6, "use_mean_pooling": False, **changes}
    return loud(getattr(transformers, f"{kind}{model}")(getattr(transformers, f"{kind}Config")(**sizes)))


def of_timm(**changes: Any) -> Any:
    torch.manual_seed(0)
    return loud(timm.models.beit.Beit(
        img_size=SIZE, patch_size=PATCH, embed_dim=192, depth=3, num_heads=HEADS, mlp_ratio=2, num_classes=5,
        use_abs_pos_emb=False, init_values=0.1, global_pool="token", **changes))


def vlmo(facts: DataFacts = NO_FEATURES, width: int = 48, **changes: Any) -> VLMo:
    torch.manual_seed(1)
    settings = {"sight": Sight(size=SIZE, patch=PATCH), "encoder": Sizes(width, 3, HEADS, 2 * width), "fused_layers": 1,
                "space": 8, "text_positions": 12, **changes}
    system = build("vlmo", VLMoConfig(**settings), tokenizer(), facts)
    assert isinstance(system, VLMo)
    return system.eval()


def samples() -> list[Sample]:
    made = []
    for number in range(3):
        written = io.BytesIO()
        drawn = np.random.default_rng(number).integers(256, size=(40, 56, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(written, "JPEG")
        made.append(Sample(str(number), (Picture(56, 40, jpeg=written.getvalue()),), caption="a star"))
    return made


def pixels(system: VLMo) -> torch.Tensor:
    """Of the patches: (B, 3, SIZE, SIZE), normalised."""
    table, side = system.preparer().inputs(samples(), ["image"]).patches, SIZE // PATCH
    embedder = system.embedders["image"]
    values_PF = (table.pixels.float() / 255 - embedder.mean) / embedder.deviation
    return values_PF.view(-1, side, side, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE)


def hidden(system: VLMo) -> torch.Tensor:
    return system.encode("image", system.preparer().inputs(samples(), ["image"])).hidden


@torch.no_grad()
@pytest.mark.parametrize("bias", ["use_shared_relative_position_bias", "use_relative_position_bias"])
def test_states_equal_those_of_transformers(tmp_path: Path, bias: str) -> None:
    settings: dict[str, Any] = {bias: True}
    original = of_transformers(use_mask_token=True, **settings)
    original.save_pretrained(tmp_path)
    system, source = vlmo(), Source.open(tmp_path)
    text = {name: tensor.clone() for name, tensor in system.state_dict().items() if "text" in name or ".fused." in name}
    assert beit.begin(system, source) == ("embedders", "positions", "stack")
    expected = original(pixels(system)).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(hidden(system), expected, **EXACT)
    assert expected.std() > 0.5 and (expected[1:] - expected[:-1]).abs().mean() > 0.3
    assert all("mask_token" in name for name in source.unused)
    assert text and all(torch.equal(system.state_dict()[name], tensor) for name, tensor in text.items())


@torch.no_grad()
@pytest.mark.parametrize("bias", ["use_shared_rel_pos_bias", "use_rel_pos_bias"])
def test_states_equal_those_of_timm(tmp_path: Path, bias: str) -> None:
    """As the authors publish it: one file, no settings; BEiT v2's has the same names."""
    original = of_timm(**{bias: True})
    torch.save({"model": original.state_dict()}, tmp_path / "beit_base.pth")
    system, source = vlmo(width=192), Source.open(tmp_path / "beit_base.pth")
    beit.begin(system, source)
    torch.testing.assert_close(hidden(system), original.forward_features(pixels(system)).flatten(0, 1), **EXACT)
    assert {name.split(".")[0] for name in source.unused} <= {"head"}


def test_an_image_mask_is_taken_where_patches_are_hidden(tmp_path: Path) -> None:
    original = of_transformers(model="ForMaskedImageModeling", use_relative_position_bias=True, use_mask_token=True)
    original.save_pretrained(tmp_path)
    system = vlmo(CODED, sight=Sight(size=SIZE, patch=PATCH, fit="squeeze"))
    beit.begin(system, Source.open(tmp_path))
    mask = system.embedders["image"].mask
    assert isinstance(mask, torch.Tensor) and torch.equal(mask, original.beit.embeddings.mask_token.flatten())


@torch.no_grad()
def test_a_vit_begins_a_vlmo_of_absolute_positions(tmp_path: Path) -> None:
    original = of_transformers(kind="ViT", use_mean_pooling=True)
    original.save_pretrained(tmp_path)
    (tmp_path / "run").mkdir()
    system = vlmo(positions="absolute")
    start = find_start([f"vit:{tmp_path}"], None, tmp_path / "run")
    assert start.fill(system) == f"embedders, stack of vit:{tmp_path}"
    torch.testing.assert_close(hidden(system), original(pixels(system)).last_hidden_state.flatten(0, 1), **EXACT)


def test_without_experts_all_modalities_begin_with_it(tmp_path: Path) -> None:
    original = of_transformers(use_shared_relative_position_bias=True)
    original.save_pretrained(tmp_path)
    system = vlmo(experts=False)
    beit.begin(system, Source.open(tmp_path))
    torch.testing.assert_close(hidden(system), original(pixels(system)).last_hidden_state.flatten(0, 1), **EXACT)


@pytest.mark.parametrize("size", [16, 64])
def test_tables_of_another_grid_are_interpolated(tmp_path: Path, size: int) -> None:
    original = of_transformers(use_shared_relative_position_bias=True, image_size=size)
    original.save_pretrained(tmp_path)
    system = vlmo()
    beit.begin(system, Source.open(tmp_path))
    theirs = original.state_dict()["shared_position_bias.relative_position_bias_table"]
    assert system.positions is not None
    ours = system.positions.table["image"]
    assert ours.shape == (7 * 7 + 3, 3 * HEADS)
    assert torch.equal(ours[-3:], theirs[-3:].repeat(1, 3))
    middle = size // PATCH * 2 - 1
    torch.testing.assert_close(ours[3 * 7 + 3, :HEADS], theirs[middle**2 // 2])  # no way apart
    torch.testing.assert_close(ours[[0, 6, 42, 48], :HEADS], theirs[[0, middle - 1, middle**2 - middle, middle**2 - 1]])


@pytest.mark.parametrize(("changes", "ours", "message"), [
    ({"num_attention_heads": 4}, {}, "with heads 3; give --model.encoder.heads 4$"),
    ({"num_hidden_layers": 2, "patch_size": 16}, {}, "--model.encoder.layers 2 --model.sight.patch 16$"),
    ({}, {"positions": "absolute"}, "with positions absolute; give --model.positions relative$"),
])
def test_what_does_not_fit_is_named_with_the_option(
    tmp_path: Path, changes: dict[str, Any], ours: dict[str, Any], message: str
) -> None:
    of_transformers(use_shared_relative_position_bias=True, **changes).save_pretrained(tmp_path)
    system = vlmo(**ours)
    before = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    with pytest.raises(UserError, match=message):
        beit.begin(system, Source.open(tmp_path))
    assert all(torch.equal(system.state_dict()[name], tensor) for name, tensor in before.items())


def test_beit3_has_no_place(tmp_path: Path) -> None:
    of_transformers(use_shared_relative_position_bias=True).save_pretrained(tmp_path)
    system = build("beit3", beit3_tiny().model, tokenizer(), CODED)
    with pytest.raises(UserError, match="'beit3' has no place for a ViT or a BEiT; leave it out"):
        find_start([f"vit:{tmp_path}"], None, tmp_path / "run").fill(system)
