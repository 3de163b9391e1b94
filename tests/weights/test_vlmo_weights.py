"""VLMo from the authors' layout: states, vectors and odds of a plain reference with their names, at random weights."""

import io
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.record import Picture, Sample
from opt.systems.vlmo import VLMo
from opt.weights.importing import Import, import_checkpoint

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]", "a", "red", "blue", "star", "##s", "and"]
TEXTS = ["a red star and blue stars and a star", "stars", "red and blue"]
WIDTH, HEADS, LAYERS, INNER, PATCH, GRID, FUSED = 32, 2, 4, 48, 8, 4, 1
PLUS_HEADS = 16
"""Of their model of absolute positions, which the file does not tell."""
IMAGE_ROWS, WORD_ROWS, LONGEST = (2 * GRID - 1) ** 2 + 3, 392, 10
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-4}


def weights(relative: bool = True, contrasts: bool = True, fused: int = FUSED) -> dict[str, Tensor]:
    """A file of theirs."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.cls_token": (1, 1, WIDTH), "transformer.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "transformer.patch_embed.proj.bias": (WIDTH,), "text_embeddings.word_embeddings.weight": (13, WIDTH),
        "text_embeddings.position_embeddings.weight": (LONGEST, WIDTH),
        "text_embeddings.token_type_embeddings.weight": (2, WIDTH), "token_type_embeddings.weight": (2, WIDTH),
        "pooler.dense.weight": (WIDTH, WIDTH), "pooler.dense.bias": (WIDTH,), "itm_score.fc.weight": (2, WIDTH),
        "itm_score.fc.bias": (2,), "mlm_score.transform.dense.weight": (WIDTH, WIDTH),
        "mlm_score.transform.dense.bias": (WIDTH,), "mlm_score.decoder.weight": (13, WIDTH), "mlm_score.bias": (13,),
    }
    if relative:
        shapes["relative_position_bias_table"] = (IMAGE_ROWS + 2 + WORD_ROWS, LAYERS * HEADS)
    else:
        shapes["transformer.pos_embed"] = (1, 1 + GRID**2, WIDTH)
    if contrasts:
        shapes |= {f"{stem}_{name}_proj.fc.weight": (WIDTH, WIDTH) for stem in ("itc", "itc_vl")
                   for name in ("text", "image")} | {"logit_scale": (), "logit_vl_scale": ()}
    norms = ["transformer.norm", "text_embeddings.LayerNorm", "mlm_score.transform.LayerNorm"]
    for number in range(LAYERS):
        block = f"transformer.blocks.{number}"
        shapes |= {f"{block}.attn.qkv.weight": (3 * WIDTH, WIDTH), f"{block}.attn.q_bias": (WIDTH,),
                   f"{block}.attn.v_bias": (WIDTH,), f"{block}.attn.proj.weight": (WIDTH, WIDTH),
                   f"{block}.attn.proj.bias": (WIDTH,), f"{block}.gamma_1": (WIDTH,), f"{block}.gamma_2": (WIDTH,)}
        names = ("text", "imag", "vl") if number >= LAYERS - fused else ("text", "imag")
        norms += [f"{block}.norm1", *(f"{block}.norm2_{name}" for name in names)]
        for name in names:
            mlp = f"{block}.mlp_{name}"
            shapes |= {f"{mlp}.fc1.weight": (INNER, WIDTH), f"{mlp}.fc1.bias": (INNER,),
                       f"{mlp}.fc2.weight": (WIDTH, INNER), f"{mlp}.fc2.bias": (WIDTH,)}
    state = {name: torch.randn(shape) * (0.1 if name.endswith(("qkv.weight", "proj.weight", "fc2.weight")) else 0.7)
             for name, shape in shapes.items()}
    state |= {f"{name}.{kind}": torch.randn(WIDTH) * 0.3 + (kind == "weight") for name in norms
              for kind in ("weight", "bias")}
    return state | {"text_embeddings.position_ids": torch.arange(LONGEST)[None]}


class Theirs:
    """What the authors compute, one sequence at a time."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, name: str, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, hidden: Tensor, epsilon: float = 1e-6) -> Tensor:
        return F.layer_norm(hidden, (WIDTH,), self.state[f"{name}.weight"], self.state[f"{name}.bias"], epsilon)

    def text(self, ids: list[int]) -> Tensor:
        table, words = self.state["text_embeddings.word_embeddings.weight"], "text_embeddings"
        embedded = table[ids] + self.state[f"{words}.token_type_embeddings.weight"][0]
        if "transformer.pos_embed" in self.state:
            embedded = embedded + self.state[f"{words}.position_embeddings.weight"][: len(ids)]
        return self.norm(f"{words}.LayerNorm", embedded, 1e-12) + self.state["token_type_embeddings.weight"][0]

    def image(self, pixels: Tensor) -> Tensor:
        patches = F.conv2d(pixels[None], self.state["transformer.patch_embed.proj.weight"],
                           self.state["transformer.patch_embed.proj.bias"], stride=PATCH)[0].flatten(1).T
        embedded = torch.cat([self.state["transformer.cls_token"][0], patches])
        if "transformer.pos_embed" in self.state:
            embedded = embedded + self.state["transformer.pos_embed"][0]
        return embedded + self.state["token_type_embeddings.weight"][1]

    def index(self, texts: int, images: int) -> Tensor:
        """Row of the table for each pair of tokens, text first: section 5.1 of the notes, written out."""
        place = [("text", at) for at in range(texts)] + [("image", at) for at in range(images)]
        end = IMAGE_ROWS + 2 + WORD_ROWS
        rows = torch.zeros(len(place), len(place), dtype=torch.long)
        for query, (one, at) in enumerate(place):
            for key, (other, to) in enumerate(place):
                last = end if one == "text" else IMAGE_ROWS
                if one != other:
                    row = IMAGE_ROWS + (one == "image")
                elif at == 0 or to == 0:
                    row = last - (1 if at == to else 3 if at == 0 else 2)
                elif one == "text":
                    row = IMAGE_ROWS + 2 + to - at + 194
                else:
                    down, right = ((at - 1) // GRID - (to - 1) // GRID, (at - 1) % GRID - (to - 1) % GRID)
                    row = (down + GRID - 1) * (2 * GRID - 1) + right + GRID - 1
                rows[query, key] = row
        return rows

    def block(self, number: int, hidden: Tensor, bias: Tensor | None, texts: int, kind: str) -> Tensor:
        name = f"transformer.blocks.{number}"
        query, key, value = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", hidden)).chunk(3, 1)
        count = HEADS if bias is not None else PLUS_HEADS
        heads = [each.unflatten(1, (count, -1)).transpose(0, 1) for each in (
            query + self.state[f"{name}.attn.q_bias"], key, value + self.state[f"{name}.attn.v_bias"])]
        scores = heads[0] @ heads[1].transpose(1, 2) / math.sqrt(WIDTH // count)
        if bias is not None:
            scores = scores + bias[..., number * HEADS : (number + 1) * HEADS].permute(2, 0, 1)
        attended = (scores.softmax(-1) @ heads[2]).transpose(0, 1).flatten(1)
        hidden = hidden + self.state[f"{name}.gamma_1"] * self.linear(f"{name}.attn.proj", attended)
        if kind == "vl" and f"{name}.mlp_vl.fc1.weight" not in self.state:
            pieces = [("text", hidden[:texts]), ("imag", hidden[texts:])]
        else:
            pieces = [(kind, hidden)]
        changes = [self.linear(f"{name}.mlp_{one}.fc2", F.gelu(self.linear(f"{name}.mlp_{one}.fc1", self.norm(
            f"{name}.norm2_{one}", piece)))) for one, piece in pieces]
        return hidden + self.state[f"{name}.gamma_2"] * torch.cat(changes)

    def states(self, text: Tensor | None, image: Tensor | None, top: str = "") -> Tensor:
        """top: the experts of the uppermost layers, where not those below."""
        parts = [part for part in (text, image) if part is not None]
        texts, bias = 0 if text is None else len(text), None
        kind = "vl" if len(parts) == 2 else "text" if image is None else "imag"
        if "relative_position_bias_table" in self.state:
            bias = self.state["relative_position_bias_table"][self.index(texts, 0 if image is None else len(image))]
        hidden = torch.cat(parts)
        for number in range(LAYERS):
            hidden = self.block(number, hidden, bias, texts, top or kind if number >= LAYERS - FUSED else kind)
        return self.norm("transformer.norm", hidden)


def samples() -> list[Sample]:
    made = []
    for number, text in enumerate(TEXTS):
        written = io.BytesIO()
        drawn = np.random.default_rng(number).integers(256, size=(40, 56, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(written, "JPEG")
        made.append(Sample(str(number), (Picture(56, 40, jpeg=written.getvalue()),), caption=text))
    return made


def imported(state: dict[str, Tensor], folder: Path, wrapper: str = "module") -> VLMo:
    torch.save({wrapper: state}, folder / "vlmo_base_patch16_224.pt")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    import_checkpoint(Import(folder / "vlmo_base_patch16_224.pt", "vlmo", folder / "ours", folder / "vocab.txt"))
    system = from_pretrained(folder / "ours")
    assert isinstance(system, VLMo)
    return system.eval()


def given(system: VLMo) -> tuple[list[list[int]], Tensor]:
    """Ids of the texts, as far as they are read, and normalised pictures (B, 3, H, W)."""
    words = system.tokenizer
    ids = [[words.cls, *words.encode(text, system.config.text_positions - 2), words.sep] for text in TEXTS]
    table, embedder = system.preparer().inputs(samples(), ["image"]).patches, system.embedders["image"]
    values = (table.pixels.float() / 255 - embedder.mean) / embedder.deviation
    pictures = values.view(-1, GRID, GRID, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return ids, pictures.reshape(-1, 3, GRID * PATCH, GRID * PATCH)


@torch.no_grad()
@pytest.mark.parametrize("relative", [True, False])
def test_states_alone_and_together_are_the_authors(tmp_path: Path, relative: bool) -> None:
    theirs = Theirs(weights(relative))
    system = imported(theirs.state, tmp_path)
    assert system.config.positions == ("relative" if relative else "absolute")
    assert system.config.text_positions == LONGEST and system.config.fused_layers == FUSED
    ids, pictures = given(system)
    texts, images = [theirs.text(each) for each in ids], [theirs.image(each) for each in pictures]
    for name, expected in (("text", [theirs.states(text, None) for text in texts]),
                           ("image", [theirs.states(None, image) for image in images])):
        hidden = system.encode(name, system.preparer().inputs(samples(), [name])).hidden
        torch.testing.assert_close(hidden, torch.cat(expected), **EXACT)
        assert hidden.std() > 0.5
    both = [theirs.states(text, image) for text, image in zip(texts, images, strict=True)]
    parts = {name: system.alone(samples(), name) for name in ("text", "image")}
    torch.testing.assert_close(system.together(parts).hidden, torch.cat(both), **EXACT)
    pooled = torch.tanh(theirs.linear("pooler.dense", torch.stack([states[0] for states in both])))
    odds = theirs.linear("itm_score.fc", pooled)
    torch.testing.assert_close(system.score(samples(), ("text", "image")), odds[:, 1] - odds[:, 0], **EXACT)


@torch.no_grad()
def test_both_contrasts_are_the_authors(tmp_path: Path) -> None:
    theirs = Theirs(weights())
    system = imported(theirs.state, tmp_path, "state_dict")
    assert system.config.contrasts == "code"
    ids, pictures = given(system)
    first = {"text": [theirs.text(each) for each in ids], "image": [theirs.image(each) for each in pictures]}
    for name, entries in first.items():
        view = (batch := system.preparer().inputs(samples(), [name])).views["encoder"]
        found = system._read(system.entries(batch, view), view)
        for space, stem, top in (("own", "itc", ""), ("fused", "itc_vl", "vl")):
            each = [theirs.states(one, None, top) if name == "text" else theirs.states(None, one, top)
                    for one in entries]
            first_SD = torch.stack([states[0] for states in each])
            vectors = F.normalize(theirs.linear(f"{stem}_{name}_proj.fc", first_SD), dim=-1)
            ours = cast(Any, system.spaces[space]).project[name](found[space][view.first])
            torch.testing.assert_close(ours, vectors, **EXACT)
            assert (vectors[1:] - vectors[:-1]).abs().max() > 0.01
    for space, scale in (("own", "logit_scale"), ("fused", "logit_vl_scale")):
        assert system.state_dict()[f"spaces.{space}.temperature.log_scale"].item() == theirs.state[scale].item()


def test_what_is_new_and_what_is_left_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of the language stage: no fused experts, no contrast; a word head with vectors of its own is left."""
    state = weights(contrasts=False, fused=0)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("itm_score")}
    system = imported(state, tmp_path)
    said, _, new = capsys.readouterr().out.partition("new in the model")
    assert system.config.fused_layers == 2 and system.config.contrasts == "paper"
    left = [line.strip() for line in said.splitlines() if line.startswith("  ")]
    assert left and all(name.startswith(("mlm_score", "text_embeddings.position")) for name in left)
    for part in ("spaces.own", "match_head", "word_head", "stack.blocks.3.feed_forward.each.fused"):
        assert f"  {part}" in new
    assert "stack.blocks.1" not in new and "attention" not in new and "each.text" not in new


def test_a_word_head_with_the_encoders_words_is_taken(tmp_path: Path) -> None:
    state = weights()
    state["mlm_score.decoder.weight"] = state["text_embeddings.word_embeddings.weight"].clone()
    system = imported(state, tmp_path)
    assert torch.equal(system.word_head.bias, state["mlm_score.bias"])
    assert torch.equal(system.word_head.norm.weight, state["mlm_score.transform.LayerNorm.weight"])


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state.pop("transformer.blocks.2.mlp_imag.fc2.weight"), "lacks|holds no"),
    (lambda state: state.pop("transformer.blocks.1.attn.q_bias"), "holds no transformer.blocks.1.attn.q_bias"),
    (lambda state: state.update(relative_position_bias_table=torch.zeros(500, 8)), "has 500 rows, not VLMo's"),
    (lambda state: [state.pop(name) for name in list(state) if "blocks" in name], "which a VLMo has"),
    (lambda state: state.update({"transformer.norm.bias": torch.full((WIDTH,), math.nan)}), "holds NaN"),
])
def test_other_files_are_named(tmp_path: Path, change: Any, message: str) -> None:
    state = weights()
    change(state)
    with pytest.raises(UserError, match=message):
        imported(state, tmp_path)
