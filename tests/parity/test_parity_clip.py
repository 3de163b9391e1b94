"""CLIP through `opt import` at random weights: towers, vectors, loss, pixels as transformers and open_clip compute."""

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.pixels import Sight, picture
from opt.data.plan import BatchPlan
from opt.data.record import Picture, Sample
from opt.objectives.term import loss
from opt.systems.clip import CLIP
from opt.systems.system import Progress
from opt.weights.importing import Import, import_checkpoint

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

MERGES = ["r e", "re d</w>", "s t", "st a", "sta r</w>", "b l", "bl u", "blu e</w>", "a n", "an d</w>"]
WORDS = 256 + 256 + len(MERGES) + 2
CAPTIONS = ["a red star", "blue and red and a star", "star"]
SIZE, PATCH, POSITIONS = 32, 8, 24
"""Of the pictures and the longest text."""
EXACT = {"rtol": 0, "atol": 1e-4}


def words_file(folder: Path) -> Path:
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(("#version\n" + "\n".join(MERGES)).encode()))
    return path


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights with norms and biases away from 1 and 0, and states of a trained network's magnitude."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "logit_scale" not in name:
                parameter.mul_(2)
    return model.eval()


def of_transformers(activation: str = "quick_gelu") -> Any:
    torch.manual_seed(0)
    both = {"layer_norm_eps": 1e-3, "hidden_act": activation}
    text = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "bos_token_id": WORDS - 2,
            "eos_token_id": WORDS - 1, "initializer_range": 0.2, **both}
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
              "image_size": SIZE, "patch_size": PATCH, **both}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    return loud(transformers.CLIPModel(config))


def of_open_clip(quick: bool, head: int = 16) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    vision = {"image_size": SIZE, "patch_size": PATCH, "layers": 2, "width": 3 * head, "head_width": head}
    text = {"context_length": POSITIONS, "vocab_size": WORDS, "width": 2 * head, "heads": 2, "layers": 3}
    settings = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text, **({"quick_gelu": True} if quick else {})}
    return loud(open_clip.CLIP(20, dict(vision), dict(text), quick_gelu=quick)), settings


def imported(source: Path, out: Path, words: Path | None = None) -> CLIP:
    import_checkpoint(Import(source, "clip", out, words))
    return from_pretrained(out)


def samples() -> list[Sample]:
    """Three pictures of other sizes than the model's, with captions."""
    made = []
    for number, (caption, sides) in enumerate(zip(CAPTIONS, ((50, 70), (64, 40), (32, 32)), strict=True)):
        rng = np.random.default_rng(number)
        drawn = jpeg(Image.fromarray(rng.integers(256, size=(*sides, 3), dtype=np.uint8)))
        made.append(Sample(str(number), (Picture(sides[1], sides[0], jpeg=drawn),), caption=caption))
    return made


def jpeg(picture: Image.Image) -> bytes:
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=95)
    return written.getvalue()


def pixels(system: CLIP) -> torch.Tensor:
    """The pictures as the other libraries take them, out of our patches: (B, 3, SIZE, SIZE)."""
    table = system.preparer().inputs(samples(), ["image"]).patches
    embedder, side = system.towers["image"].embedder, SIZE // PATCH
    values_PF = (table.pixels.float() / 255 - embedder.mean) / embedder.deviation
    grid = values_PF.view(len(CAPTIONS), side, side, 3, PATCH, PATCH)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE)


def ids(system: CLIP) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions padded behind [EOS] (B, POSITIONS), and which places are real."""
    rows = [torch.tensor([system.tokenizer.bos, *system.tokenizer.encode(text), system.tokenizer.eos])
            for text in CAPTIONS]
    lengths = torch.tensor([len(row) for row in rows])
    padded = [torch.nn.functional.pad(row, (0, POSITIONS - len(row))) for row in rows]
    return torch.stack(padded), torch.arange(POSITIONS) < lengths[:, None]


def hidden(system: CLIP, modality: str) -> torch.Tensor:
    return system.encode(modality, system.preparer().inputs(samples(), [modality])).hidden


def training_loss(system: CLIP) -> torch.Tensor:
    numbers = np.arange(len(CAPTIONS))
    plan = BatchPlan(numbers, 0 * numbers, np.full((len(numbers), 2), -1), numbers.astype(np.uint64), 0, 0, 3)
    batch = system.preparer()(dict(enumerate(samples())), plan)
    terms = system(batch, Progress(0, 0.0)).terms
    return loss({name: term for name, term in terms.items() if float(term.count)})


def assert_equal_vectors(system: CLIP, image: torch.Tensor, text: torch.Tensor) -> None:
    for modality, expected in (("image", image), ("text", text)):
        vectors = system.embed(samples(), [modality])
        torch.testing.assert_close(vectors, torch.nn.functional.normalize(expected, dim=-1), **EXACT)
    assert float((vectors @ vectors.T).min()) < 0.97  # captions differ


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_towers_vectors_and_loss_equal_those_of_transformers(tmp_path: Path, activation: str) -> None:
    original = of_transformers(activation)
    original.save_pretrained(tmp_path / "theirs")
    words_file(tmp_path / "theirs")
    system = imported(tmp_path / "theirs", tmp_path / "ours")
    assert system.config.activation == activation and system.config.norm_epsilon == 1e-3
    ids_BL, valid = ids(system)
    theirs = original(input_ids=ids_BL, attention_mask=valid.long(), pixel_values=pixels(system), return_loss=True)
    for modality, states in (("text", theirs.text_model_output.last_hidden_state[valid]),
                             ("image", theirs.vision_model_output.last_hidden_state.flatten(0, 1))):
        ours = hidden(system, modality)
        if modality == "image":  # theirs are not normalised yet but for the first
            first = theirs.vision_model_output.last_hidden_state.flatten(0, 1)
            states = original.vision_model.post_layernorm(first)
        torch.testing.assert_close(ours, states, **EXACT)
        assert states.std() > 0.5
    assert_equal_vectors(system, theirs.image_embeds, theirs.text_embeds)
    torch.testing.assert_close(training_loss(system), theirs.loss, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("quick", [False, True])
def test_towers_vectors_and_loss_equal_those_of_open_clip(tmp_path: Path, quick: bool) -> None:
    original, settings = of_open_clip(quick)
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(original.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": settings, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3, "resize_mode": "squash"}}))
    system = imported(folder, tmp_path / "ours", words_file(tmp_path))
    assert system.config.activation == ("quick_gelu" if quick else "gelu")
    assert (system.config.sight.fit, system.config.sight.mean) == ("squeeze", (0.4, 0.4, 0.4))
    ids_BL, _ = ids(system)
    image, text = original.encode_image(pixels(system)), original.encode_text(ids_BL)
    assert_equal_vectors(system, image, text)
    features = [torch.nn.functional.normalize(each, dim=-1) for each in (image, text)]
    theirs = open_clip.ClipLoss()(*features, original.logit_scale.exp())
    torch.testing.assert_close(training_loss(system), theirs, **EXACT)


def test_older_settings(tmp_path: Path) -> None:
    """OpenAI's folders have the settings of the towers under another name, or under both."""
    original = of_transformers("gelu")
    original.save_pretrained(tmp_path)
    words_file(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    for part in ("text", "vision"):
        settings[f"{part}_config_dict"] = settings.pop(f"{part}_config")
    path.write_text(json.dumps({**settings, "text_config": {"hidden_act": "quick_gelu"}, "vision_config": None}))
    config = imported(tmp_path, tmp_path / "ours").config
    assert (config.activation, config.text.heads, config.image.heads) == ("gelu", 4, 3)


def test_one_file_of_openai_computes_quick_gelu_and_others_must_say(tmp_path: Path) -> None:
    state = {**of_open_clip(True, head=64)[0].state_dict(), "input_resolution": torch.tensor(SIZE),
             "context_length": torch.tensor(POSITIONS), "vocab_size": torch.tensor(WORDS)}
    path = tmp_path / "ViT.pt"
    torch.save({"state_dict": {f"module.{name}": tensor.half() for name, tensor in state.items()}}, path)
    system = imported(path, tmp_path / "ours", words_file(tmp_path))
    assert system.config.activation == "quick_gelu" and system.config.sight.size == SIZE
    torch.save({name: tensor for name, tensor in state.items() if name != "vocab_size"}, path)
    with pytest.raises(UserError, match="does not say whether .* gelu or quick_gelu"):
        imported(path, tmp_path / "other", tmp_path)
    with pytest.raises(UserError, match="one file and holds no words: give --tokenizer"):
        imported(path, tmp_path / "other")


@pytest.mark.parametrize(("place", "changes", "message"), [
    ("config.json", {"model_type": "siglip"}, "model_type is 'siglip', expected 'clip'"),
    ("config.json", {"text_config": {"hidden_act": "relu"}}, "hidden_act is 'relu' for text"),
    ("config.json", {"text_config": {"hidden_act": "relu"}, "vision_config": {"hidden_act": "relu"}},
     "expected gelu or quick_gelu"),
    ("open_clip_config.json", {"text_cfg": {"no_causal_mask": True}}, "text_cfg has no_causal_mask True"),
    ("open_clip_config.json", {"vision_cfg": {"timm_model_name": "x"}}, "vision_cfg has timm_model_name 'x'"),
])
def test_other_networks_are_refused(tmp_path: Path, place: str, changes: dict[str, Any], message: str) -> None:
    if place == "config.json":
        of_transformers().save_pretrained(tmp_path)
        content = {**json.loads((tmp_path / place).read_text()), **changes}
    else:
        torch.save(of_open_clip(False)[0].state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        content = {"model_cfg": {"embed_dim": 20, **changes}}
    (tmp_path / place).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        imported(tmp_path, tmp_path / "ours", words_file(tmp_path))


@pytest.mark.parametrize("size", [48, 224])
def test_pixels_of_a_photo_are_those_of_transformers(size: int) -> None:
    """The same numbers where transformers resizes with Pillow, as CLIP's authors do; its faster way, on tensors, rounds
    otherwise."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = Path(os.environ.get("OPT_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
    photos = sorted((folder / "flickr-speech" / "images").glob("*.jpg"))[:6]
    if not photos:
        pytest.skip("no real data")
    sight = Sight(size=size, patch=8, fit="crop")
    mean, deviation = (torch.tensor(channels)[:, None, None] for channels in (sight.mean, sight.deviation))
    sides = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    for kind, most in ((CLIPImageProcessorPil, 1e-3), (transformers.CLIPImageProcessor, 2.001)):
        for photo in photos:
            given = kind(**sides)(images=Image.open(photo), return_tensors="pt")["pixel_values"][0]
            theirs = (given * deviation + mean) * 255
            ours = torch.tensor(picture(photo.read_bytes(), sight)).permute(2, 0, 1)
            assert float((theirs - ours).abs().max()) < most
