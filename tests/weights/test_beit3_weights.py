"""BEiT-3 from the authors' layout: states, vectors and words of a plain reference with their names, random weights."""

import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.record import Picture, Sample
from opt.systems.beit3 import BEiT3
from opt.weights.importing import Import, import_checkpoint

PIECES = ["<unk>", "<s>", "</s>", "▁a", "▁red", "▁blue", "▁star", "s", "▁and", "▁"]
TEXTS = ["a red star and blue stars", "stars", "red and blue"]
WORDS, SPARE = len(PIECES) + 2, 8
WIDTH, HEADS, LAYERS, INNER, PATCH, GRID = 128, 2, 2, 80, 8, 4
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-4}
NORMS = ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm")


def words(folder: Path) -> Path:
    """A file of SentencePiece."""
    path, content = folder / "beit3.spm", b""
    for number, piece in enumerate(PIECES):
        text = piece.encode()
        entry = bytes([10, len(text)]) + text + b"\x15" + struct.pack("<f", 0.0 if number < 3 else -float(number))
        entry += b"" if number > 2 else bytes([24, 2 if number == 0 else 3])
        content += bytes([10, len(entry)]) + entry
    path.write_bytes(content)
    return path


def weights(heads: tuple[str, ...] = ("language_head", "vision_head"), last_norm: bool = True) -> dict[str, Tensor]:
    """A file of theirs."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "beit3.text_embed.weight": (WORDS + SPARE, WIDTH), "beit3.vision_embed.cls_token": (1, 1, WIDTH),
        "beit3.vision_embed.mask_token": (1, 1, WIDTH), "beit3.vision_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "beit3.vision_embed.proj.bias": (WIDTH,), "beit3.encoder.embed_positions.A.weight": (GRID**2 + 3, WIDTH),
        "beit3.encoder.embed_positions.B.weight": (24, WIDTH),
    }
    if "language_head" in heads:
        shapes |= {"language_head.weight": (WIDTH, WIDTH), "vision_head.weight": (WIDTH, WIDTH), "logit_scale": ()}
    if "mlm_head" in heads:
        shapes |= {"mlm_head.weight": (WORDS + SPARE, WIDTH), "mlm_head.bias": (WORDS + SPARE,)}
    norms = [f"beit3.encoder.layer_norm.{kind}" for kind in "AB"] if last_norm else []
    wide = []
    for number in range(LAYERS):
        layer = f"beit3.encoder.layers.{number}"
        for kind in "AB":
            norms += [f"{layer}.{name}.{kind}" for name in NORMS]
            wide.append(f"{layer}.ffn.{kind}.ffn_layernorm")
            for name in "qkv":
                shapes |= {f"{layer}.self_attn.{name}_proj.{kind}.weight": (WIDTH, WIDTH),
                           f"{layer}.self_attn.{name}_proj.{kind}.bias": (WIDTH,)}
            shapes |= {f"{layer}.self_attn.out_proj.{kind}.weight": (WIDTH, WIDTH),
                       f"{layer}.self_attn.out_proj.{kind}.bias": (WIDTH,),
                       f"{layer}.ffn.{kind}.fc1.weight": (INNER, WIDTH), f"{layer}.ffn.{kind}.fc1.bias": (INNER,),
                       f"{layer}.ffn.{kind}.fc2.weight": (WIDTH, INNER), f"{layer}.ffn.{kind}.fc2.bias": (WIDTH,)}
    state = {name: torch.randn(shape) * (0.1 if name.endswith("weight") and "embed" not in name else 0.5)
             for name, shape in shapes.items()}
    return state | {f"{name}.{part}": torch.randn(INNER if name in wide else WIDTH) * 0.3 + (part == "weight")
                    for name in [*norms, *wide] for part in ("weight", "bias")}


class Theirs:
    """What the authors compute, one sequence at a time: a picture's tokens first, then a text's."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def each(self, name: str, behind: str, hidden: Tensor, images: int) -> Tensor:
        """A module with its own weights for pictures and for texts."""
        pieces = []
        for kind, piece in (("A", hidden[:images]), ("B", hidden[images:])):
            weight, bias = (self.state[f"{name}.{kind}{behind}.{part}"] for part in ("weight", "bias"))
            pieces.append(F.linear(piece, weight, bias) if weight.ndim == 2 else
                          F.layer_norm(piece, weight.shape, weight, bias, 1e-5))
        return torch.cat(pieces)

    def states(self, ids: list[int] | None, pixels: Tensor | None) -> Tensor:
        parts, images = [], 0
        if pixels is not None:
            stem = "beit3.vision_embed"
            patches = F.conv2d(pixels[None], self.state[f"{stem}.proj.weight"], self.state[f"{stem}.proj.bias"],
                               stride=PATCH)[0].flatten(1).T
            parts.append(torch.cat([self.state[f"{stem}.cls_token"][0], patches]))
            images = len(parts[0])
            parts[0] = parts[0] + self.state["beit3.encoder.embed_positions.A.weight"][2 : 2 + images]
        if ids is not None:
            embedded = self.state["beit3.text_embed.weight"][ids]
            parts.append(embedded + self.state["beit3.encoder.embed_positions.B.weight"][2 : 2 + len(ids)])
        hidden = torch.cat(parts)
        for number in range(LAYERS):
            layer = f"beit3.encoder.layers.{number}"
            normed = self.each(f"{layer}.self_attn_layer_norm", "", hidden, images)
            query, key, value = (self.each(f"{layer}.self_attn.{name}_proj", "", normed, images).unflatten(
                1, (HEADS, -1)).transpose(0, 1) for name in "qkv")
            scores = query @ key.transpose(1, 2) / math.sqrt(WIDTH // HEADS)
            attended = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
            attended = self.each(f"{layer}.self_attn.inner_attn_ln", "", attended, images)
            hidden = hidden + self.each(f"{layer}.self_attn.out_proj", "", attended, images)
            normed = self.each(f"{layer}.final_layer_norm", "", hidden, images)
            inner = F.gelu(self.each(f"{layer}.ffn", ".fc1", normed, images))
            inner = self.each(f"{layer}.ffn", ".ffn_layernorm", inner, images)
            hidden = hidden + self.each(f"{layer}.ffn", ".fc2", inner, images)
        return self.each("beit3.encoder.layer_norm", "", hidden, images)


def samples() -> list[Sample]:
    made = []
    for number, text in enumerate(TEXTS):
        written = io.BytesIO()
        drawn = np.random.default_rng(number).integers(256, size=(40, 56, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(written, "JPEG")
        made.append(Sample(str(number), (Picture(56, 40, jpeg=written.getvalue()),), caption=text))
    return made


def imported(state: dict[str, Tensor], folder: Path) -> BEiT3:
    torch.save({"model": state}, folder / "beit3_base_patch16_224.pth")
    import_checkpoint(Import(folder / "beit3_base_patch16_224.pth", "beit3", folder / "ours", words(folder)))
    system = from_pretrained(folder / "ours")
    assert isinstance(system, BEiT3)
    return system.eval()


def given(system: BEiT3) -> tuple[list[list[int]], Tensor]:
    """Ids of the texts, and normalised pictures (B, 3, H, W)."""
    tokenizer = system.tokenizer
    ids = [[tokenizer.cls, *tokenizer.encode(text), tokenizer.sep] for text in TEXTS]
    table, embedder = system.preparer().inputs(samples(), ["image"]).patches, system.embedders["image"]
    values = (table.pixels.float() / 255 - embedder.mean) / embedder.deviation
    pictures = values.view(-1, GRID, GRID, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return ids, pictures.reshape(-1, 3, GRID * PATCH, GRID * PATCH)


@torch.no_grad()
def test_states_and_vectors_are_the_authors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = Theirs(weights())
    system = imported(theirs.state, tmp_path)
    assert "not used: nothing" in capsys.readouterr().out
    assert system.config.sharing == "code" and system.config.encoder.heads == HEADS
    assert system.config.text_positions == 22 and system.tokenizer.size == WORDS
    ids, pictures = given(system)
    assert ids[1] == [0, 7, 8, 2]
    alone = {"text": [theirs.states(each, None) for each in ids],
             "image": [theirs.states(None, each) for each in pictures]}
    for name, expected in alone.items():
        states = system.encode(name, system.preparer().inputs(samples(), [name]))
        torch.testing.assert_close(states.hidden, torch.cat(expected), **EXACT)
        head = theirs.state[{"text": "language_head", "image": "vision_head"}[name] + ".weight"]
        vectors = F.normalize(torch.stack([each[0] for each in expected]) @ head.T, dim=-1)
        torch.testing.assert_close(system.vector(name, states), vectors, **EXACT)
        assert states.hidden.std() > 0.5
    both = [theirs.states(text, image) for text, image in zip(ids, pictures, strict=True)]
    parts = {name: system.alone(samples(), name) for name in ("text", "image")}
    torch.testing.assert_close(system.together(parts).hidden, torch.cat(both), **EXACT)
    assert system.temperature.log_scale.item() == theirs.state["logit_scale"].item()
    assert isinstance(system.embedders["image"].mask, Tensor)
    assert torch.equal(system.embedders["image"].mask, theirs.state["beit3.vision_embed.mask_token"].flatten())


@torch.no_grad()
def test_words_are_told_as_the_authors_tell_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file tuned for captions: no contrast, which is new."""
    theirs = Theirs(weights(("mlm_head",)))
    system = imported(theirs.state, tmp_path)
    new = capsys.readouterr().out.partition("new in the model")[2]
    assert "project.text.linear.weight" in new and "temperature.log_scale" in new and "heads." not in new
    ids, _ = given(system)
    states = system.encode("text", system.preparer().inputs(samples(), ["text"])).hidden
    expected = torch.cat([theirs.states(each, None) for each in ids])
    logits = F.linear(expected, theirs.state["mlm_head.weight"], theirs.state["mlm_head.bias"])[:, :WORDS]
    torch.testing.assert_close(system.heads["text"](states), logits, **EXACT)


def test_without_a_last_norm_it_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(weights(last_norm=False), tmp_path)
    assert "  stack.final_norm.each.text.bias" in capsys.readouterr().out.partition("new in the model")[2]


def rows(state: dict[str, Tensor], count: int) -> None:
    state["beit3.text_embed.weight"] = torch.randn(count, WIDTH)


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: rows(state, WORDS + SPARE + 1), "has 21 rows, the words are 12; give those"),
    (lambda state: rows(state, WORDS - 1), "has 11 rows, the words are 12; give those"),
    (lambda state: state.pop("beit3.encoder.layers.1.ffn.B.fc2.bias"), "holds no beit3.encoder.layers.1.ffn.B.fc2.b"),
    (lambda state: state.pop("beit3.text_embed.weight"), "holds no beit3.text_embed.weight"),
    (lambda state: [state.pop(name) for name in list(state) if ".layers." in name], "holds no beit3.encoder.layers.0"),
])
def test_other_files_and_other_words_are_named(tmp_path: Path, change: Any, message: str) -> None:
    state = weights()
    change(state)
    with pytest.raises(UserError, match=message):
        imported(state, tmp_path)


def test_one_file_needs_its_words(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "beit3.pth")
    with pytest.raises(UserError, match="is one file and holds no words: give --tokenizer"):
        import_checkpoint(Import(tmp_path / "beit3.pth", "beit3", tmp_path / "ours"))
