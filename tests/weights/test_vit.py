"""Picture towers begun from ViT and DeiT, text towers from BERT: states as the originals have them, twins too."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opt.config import UserError
from opt.data.pixels import Sight
from opt.data.record import Picture, Sample
from opt.data.tokenizer import Tokenizer
from opt.systems.albef import ALBEF, ALBEFConfig
from opt.systems.blip import BLIP, BLIPConfig
from opt.systems.clip import CLIP, CLIPConfig
from opt.systems.shared.config import Sizes
from opt.systems.system import System
from opt.systems.vilt import ViLT, ViLTConfig
from opt.weights import bert, vit
from opt.weights.importing import NO_FEATURES
from opt.weights.source import Source
from pretrain.start import find_start

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

LINES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "star", "a", "and", "##s"]
TEXTS = ["a red star and blue stars", "stars", "red and blue"]
SIZE, PATCH = 32, 8
IMAGE, TEXT = Sizes(48, 2, 3, 96), Sizes(32, 4, 4, 64)
SIGHT = Sight(size=SIZE, patch=PATCH)
EXACT = {"rtol": 0, "atol": 1e-4}


def loud(model: torch.nn.Module) -> Any:
    """Random weights with norms and biases away from 1 and 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    return model.eval()


def of_transformers(kind: str, size: int = SIZE, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96,
             "image_size": size, "patch_size": PATCH, "layer_norm_eps": 1e-6, **changes}
    return loud(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)))


def of_timm(distilled: bool = False) -> Any:
    torch.manual_seed(0)
    kind = timm.models.VisionTransformerDistilled if distilled else timm.models.VisionTransformer
    return loud(kind(img_size=SIZE, patch_size=PATCH, embed_dim=64 * 3, depth=2, num_heads=3, mlp_ratio=2,
                     num_classes=5))


def of_bert(folder: Path, layers: int = 4) -> Any:
    torch.manual_seed(1)
    model = loud(transformers.BertForPreTraining(transformers.BertConfig(
        vocab_size=len(LINES), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40)))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(LINES) + "\n")
    return model


def words(folder: Path) -> Tokenizer:
    (folder / "vocab.txt").write_text("\n".join(LINES) + "\n")
    return Tokenizer.from_vocab(folder / "vocab.txt")


def albef(tokenizer: Tokenizer, **changes: Any) -> ALBEF:
    torch.manual_seed(2)
    config = ALBEFConfig(SIGHT, IMAGE, dataclasses.replace(TEXT, layers=3), fusion_layers=1, space=8, dropout=0.0,
                         ring_rows=8)
    return ALBEF(dataclasses.replace(config, **changes), tokenizer, NO_FEATURES).eval()


def blip(tokenizer: Tokenizer) -> BLIP:
    torch.manual_seed(2)
    return BLIP(BLIPConfig(SIGHT, IMAGE, TEXT, space=8, dropout=0.0, ring_rows=8), tokenizer, NO_FEATURES).eval()


def samples() -> list[Sample]:
    made = []
    for number, text in enumerate(TEXTS):
        written = io.BytesIO()
        drawn = np.random.default_rng(number).integers(256, size=(40, 56, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(written, "JPEG")
        made.append(Sample(str(number), (Picture(56, 40, jpeg=written.getvalue()),), caption=text))
    return made


def hidden(system: Any, modality: str) -> torch.Tensor:
    batch = system.preparer().inputs(samples(), [modality])
    return (system.encode if isinstance(system, ALBEF) else system.encoders.read)(modality, batch).hidden


def pixels(system: Any) -> torch.Tensor:
    """Of the patches: (B, 3, SIZE, SIZE), normalised."""
    table, side = system.preparer().inputs(samples(), ["image"]).patches, SIZE // PATCH
    embedder = system.encoders.towers["image"].embedder
    values_PF = (table.pixels.float() / 255 - embedder.mean) / embedder.deviation
    return values_PF.view(-1, side, side, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE)


def padded(tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.tensor([tokenizer.cls, *tokenizer.encode(text), tokenizer.sep]) for text in TEXTS]
    lengths = torch.tensor([len(row) for row in rows])
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids_BL, torch.arange(ids_BL.shape[1]) < lengths[:, None]


def assert_twin_is_the_same(system: Any) -> None:
    for name, tensor in system.encoders.state_dict().items():
        assert torch.equal(system.twin.copy.state_dict()[name], tensor), name


@torch.no_grad()
@pytest.mark.parametrize("make", [albef, blip])
@pytest.mark.parametrize("kind", ["ViT", "ViTForImageClassification"])
def test_states_equal_those_of_transformers(tmp_path: Path, make: Any, kind: str) -> None:
    original = of_transformers("ViT")
    saved = original
    if kind != "ViT":  # names begin with "vit."
        saved = transformers.ViTForImageClassification(original.config)
        saved.vit.load_state_dict(original.state_dict(), strict=False)
    saved.save_pretrained(tmp_path / "vit")
    system = make(words(tmp_path))
    source = Source.open(tmp_path / "vit")
    assert vit.begin(system, source) == ("encoders", "twin")
    expected = original(pixels(system)).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(hidden(system, "image"), expected, **EXACT)
    assert expected.std() > 0.5
    assert all(name.startswith(("classifier.", "pooler.")) for name in source.unused)
    assert_twin_is_the_same(system)


@torch.no_grad()
@pytest.mark.parametrize("distilled", [False, True])
def test_states_equal_those_of_timm(tmp_path: Path, distilled: bool) -> None:
    """As DeiT's authors publish it: one file, no settings. The distillation token stays behind."""
    original = of_timm(distilled)
    torch.save({"model": original.state_dict()}, tmp_path / "deit.pth")
    system = albef(words(tmp_path), image=Sizes(192, 2, 3, 384))
    source = Source.open(tmp_path / "deit.pth")
    vit.begin(system, source)
    assert all("head" in name or name == "dist_token" for name in source.unused)
    if not distilled:
        torch.testing.assert_close(hidden(system, "image"), original.forward_features(pixels(system)).flatten(0, 1),
                                   **EXACT)
    else:
        own = system.encoders.towers["image"].embedder
        torch.testing.assert_close(own.position.weight[1:], original.pos_embed[0, 2:])
        torch.testing.assert_close(own.position.weight[0] + own.first[0],
                                   original.pos_embed[0, 0] + original.cls_token[0, 0])
    assert_twin_is_the_same(system)


def test_deit_of_transformers_leaves_its_second_token_behind(tmp_path: Path) -> None:
    original = of_transformers("DeiT")
    original.save_pretrained(tmp_path / "deit")
    system = albef(words(tmp_path))
    vit.begin(system, Source.open(tmp_path / "deit"))
    table = original.embeddings.position_embeddings[0]
    torch.testing.assert_close(system.encoders.towers["image"].embedder.position.weight,
                               torch.cat([table[:1], table[2:]]))


@pytest.mark.parametrize("size", [16, 64])
def test_positions_of_another_grid_are_interpolated(tmp_path: Path, size: int) -> None:
    original = of_transformers("ViT", size)
    original.save_pretrained(tmp_path / "vit")
    system = albef(words(tmp_path))
    vit.begin(system, Source.open(tmp_path / "vit"))
    expected = timm.layers.resample_abs_pos_embed(original.embeddings.position_embeddings, [4, 4], antialias=False)
    torch.testing.assert_close(system.encoders.towers["image"].embedder.position.weight, expected[0])


@torch.no_grad()
def test_vilt_begins_with_a_vit_and_keeps_its_words(tmp_path: Path) -> None:
    of_transformers("ViT").save_pretrained(tmp_path / "vit")
    theirs = load_file(tmp_path / "vit" / "model.safetensors")
    torch.manual_seed(2)
    system = ViLT(ViLTConfig(dataclasses.replace(SIGHT, fit="keep", longest=63), IMAGE, dropout=0.0, text_positions=16),
                  words(tmp_path), NO_FEATURES)
    token = system.text.token.weight.clone()
    assert vit.begin(system, Source.open(tmp_path / "vit")) == ("image", "encoder")
    assert torch.equal(system.text.token.weight, token)
    torch.testing.assert_close(system.encoder.blocks[1].self_attention.key_value.weight[48:],
                               theirs["encoder.layer.1.attention.attention.value.weight"])
    torch.testing.assert_close(system.encoder.final_norm.weight, theirs["layernorm.weight"])


@torch.no_grad()
def test_the_fusion_goes_on_where_the_text_tower_ends(tmp_path: Path) -> None:
    """Without a context ALBEF's text tower and fusion are all of BERT."""
    original = of_bert(tmp_path)
    system = albef(Tokenizer.from_bert(tmp_path), text_positions=16)
    cross = system.encoders.fusion.blocks[0].cross_attention.query.weight.clone()
    assert bert.begin(system, bert.describe(tmp_path)) == ("encoders", "twin")
    ids_BL, valid = padded(system.tokenizer)
    theirs = original(input_ids=ids_BL, attention_mask=valid.long(), output_hidden_states=True)
    batch = system.preparer().inputs(samples(), ["text"])
    states = system.encode("text", batch)
    torch.testing.assert_close(states.hidden, theirs.hidden_states[3][valid], **EXACT)
    fused = system.encoders.fusion(states.hidden, states.layout)
    torch.testing.assert_close(fused, theirs.hidden_states[4][valid], **EXACT)
    logits = system.encoders.words(fused)[:, : len(LINES)]
    torch.testing.assert_close(logits, theirs.prediction_logits[valid], **EXACT)
    assert theirs.prediction_logits.std() > 0.5
    assert torch.equal(system.encoders.fusion.blocks[0].cross_attention.query.weight, cross)
    assert_twin_is_the_same(system)


@torch.no_grad()
def test_what_reads_and_what_writes_begin_with_the_same_attention(tmp_path: Path) -> None:
    original = of_bert(tmp_path)
    system = blip(Tokenizer.from_bert(tmp_path))
    assert bert.begin(system, bert.describe(tmp_path)) == ("encoders", "word_head", "twin")
    ids_BL, valid = padded(system.tokenizer)
    theirs = original.bert(input_ids=ids_BL, attention_mask=valid.long()).last_hidden_state[valid]
    torch.testing.assert_close(hidden(system, "text"), theirs, **EXACT)
    for number, block in enumerate(system.encoders.towers["text"].stack.blocks):
        layer = original.bert.encoder.layer[number]
        assert torch.equal(block.writing_attention.query.weight, layer.attention.self.query.weight)
        assert torch.equal(block.writing_norm.bias, block.self_norm.bias)
    assert torch.equal(system.word_head.transform.weight, original.cls.predictions.transform.dense.weight)
    assert_twin_is_the_same(system)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 3}, "with layers 2; give --model.image.layers 3$"),
    ({"num_attention_heads": 4, "intermediate_size": 64},
     "with heads 3, inner 96; give --model.image.heads 4 --model.image.inner 64$"),
    ({"patch_size": 16}, "with patch 8; give --model.sight.patch 16$"),
])
def test_sizes_that_do_not_fit_are_named_with_the_option(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    of_transformers("ViT", **changes).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match=message):
        vit.begin(albef(words(tmp_path)), Source.open(tmp_path / "vit"))


def test_layers_of_bert_that_the_fusion_lacks_are_named(tmp_path: Path) -> None:
    of_bert(tmp_path, layers=5)
    with pytest.raises(UserError, match=r"with layers 3; give --model.text.layers 4$"):
        bert.begin(albef(Tokenizer.from_bert(tmp_path)), bert.describe(tmp_path))


def test_systems_without_a_place(tmp_path: Path) -> None:
    of_transformers("ViT").save_pretrained(tmp_path / "vit")
    of_bert(tmp_path)
    clip: System = CLIP(CLIPConfig(SIGHT, IMAGE, TEXT, space=8), Tokenizer.from_bert(tmp_path), NO_FEATURES)
    with pytest.raises(UserError, match="system 'clip' has no place for a ViT; leave it out"):
        vit.begin(clip, Source.open(tmp_path / "vit"))
    with pytest.raises(UserError, match="system 'clip' has no place for a BERT; leave it out"):
        bert.begin(clip, bert.describe(tmp_path))
    (tmp_path / "vit" / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="does not say how many heads"):  # 48 numbers are no heads of 64
        vit.begin(albef(Tokenizer.from_bert(tmp_path)), Source.open(tmp_path / "vit"))


@torch.no_grad()
def test_a_run_begins_with_both(tmp_path: Path) -> None:
    (tmp_path / "a ViT").mkdir()
    (tmp_path / "bert").mkdir()
    seen, read = of_transformers("ViT"), of_bert(tmp_path / "bert")
    seen.save_pretrained(tmp_path / "a ViT")
    sources = [f"bert:{tmp_path / 'bert'}", f"vit:{tmp_path / 'a ViT'}"]
    start = find_start(sources, None, tmp_path / "run")
    assert start.tokenizer is not None and len(start.sha256) == 64
    assert start.sha256 != find_start(sources[:1], None, tmp_path / "run").sha256
    system = albef(start.tokenizer)
    said = start.fill(system)
    assert "of bert:" in said and said.endswith(f"of vit:{tmp_path / 'a ViT'}")
    assert torch.equal(system.encoders.towers["image"].stack.final_norm.bias, seen.layernorm.bias)
    assert torch.equal(system.encoders.fusion.blocks[0].feed_forward[0].weight,
                       read.bert.encoder.layer[3].intermediate.dense.weight)
    alone = find_start(sources[1:], None, tmp_path / "run")
    assert alone.tokenizer is None and alone.sha256 == Source.open(tmp_path / "a ViT").sha256


@pytest.mark.parametrize("sources", [["gpt:x"], ["bert:"], ["vit"], ["model:a", "bert:b"], ["bert:a", "bert:b"], [""]])
def test_other_starts_are_refused(tmp_path: Path, sources: list[str]) -> None:
    with pytest.raises(UserError, match="expected model:FOLDER"):
        find_start(sources, None, tmp_path / "run")
