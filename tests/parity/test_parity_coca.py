"""CoCa through `opt import` at random weights: tokens, vectors, captions and both losses as open_clip computes them."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.batch import Batch
from opt.data.plan import BatchPlan
from opt.data.record import Picture, Sample
from opt.nn.sampling import Sampling
from opt.systems.coca import CoCa
from opt.systems.system import Progress
from opt.weights.importing import Import, import_checkpoint

open_clip = pytest.importorskip("open_clip")

MERGES = ["r e", "re d</w>", "s t", "st a", "sta r</w>", "b l", "bl u", "blu e</w>", "a n", "an d</w>"]
WORDS = 256 + 256 + len(MERGES) + 2
CAPTIONS = ["a red star", "blue and red and a star", "star"]
SIZE, PATCH, POSITIONS, QUERIES = 32, 8, 24, 5
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-4}
VISION = {"image_size": SIZE, "patch_size": PATCH, "layers": 2, "width": 48, "head_width": 16,
          "attn_pooler_queries": QUERIES, "attn_pooler_heads": 4, "output_tokens": True}
TEXT = {"context_length": POSITIONS, "vocab_size": WORDS, "width": 32, "heads": 2, "layers": 3}
KINDS: list[tuple[bool | str, bool]] = [(True, False), ("cascade", True), ("parallel", False)]
"""open_clip's attentional_pool, and whether it computes quick_gelu."""


def original(pool: bool | str = True, quick: bool = False) -> tuple[Any, dict[str, Any]]:
    """A CoCa of open_clip with random weights, norms and biases away from 1 and 0, and its settings."""
    torch.manual_seed(0)
    width = 48 if pool is True else 32  # its two poolers need a picture as wide as the space
    settings = {
        "embed_dim": 32, "quick_gelu": quick, "custom_text": True,
        "vision_cfg": {**VISION, "width": width, "attentional_pool": pool},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True}, "multimodal_cfg": {**TEXT, "layers": 2},
    }
    model = open_clip.coca_model.CoCa(**{name: value for name, value in settings.items() if name != "custom_text"})
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.2)  # open_clip leaves it as memory was
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "logit_scale" not in name:
                parameter.mul_(2)
    model.text.correct_cls_mask = True  # [CLS] sees itself: opt/weights/coca.py
    return model.eval(), settings


def words_file(folder: Path) -> Path:
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(("#version\n" + "\n".join(MERGES)).encode()))
    return path


def saved(folder: Path, model: Any, settings: dict[str, Any]) -> Path:
    folder.mkdir()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    words_file(folder)
    return folder


def imported(folder: Path, model: Any, settings: dict[str, Any]) -> CoCa:
    import_checkpoint(Import(saved(folder / "theirs", model, settings), "coca", folder / "ours"))
    system = from_pretrained(folder / "ours")
    assert isinstance(system, CoCa)
    return system


def samples() -> list[Sample]:
    made = []
    for number, caption in enumerate(CAPTIONS):
        noise = np.random.default_rng(number).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG")
        made.append(Sample(str(number), (Picture(SIZE, SIZE, jpeg=file.getvalue()),), caption=caption))
    return made


def theirs(system: CoCa) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 3, SIZE, SIZE) and ids (B, POSITIONS) as open_clip takes them: 0 behind the end."""
    sight, tokenizer = system.config.sight, system.tokenizer
    pictures = [np.asarray(Image.open(io.BytesIO(sample.pictures[0].jpeg or b""))) for sample in samples()]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (sight.mean, sight.deviation))
    ids = torch.zeros(len(CAPTIONS), POSITIONS, dtype=torch.int64)
    for row, caption in zip(ids, CAPTIONS, strict=True):
        found = torch.tensor([tokenizer.bos, *tokenizer.encode(caption), tokenizer.eos])
        row[: len(found)] = found
    return (pixels - mean) / deviation, ids


def batch(system: CoCa) -> Batch:
    numbers = np.arange(len(CAPTIONS))
    plan = BatchPlan(numbers, 0 * numbers, np.full((len(numbers), 2), -1), numbers.astype(np.uint64), 0, 0, 3)
    return system.preparer()(dict(enumerate(samples())), plan)


@torch.no_grad()
@pytest.mark.parametrize(("pool", "quick"), KINDS)
def test_tokens_vectors_and_both_losses_equal_those_of_open_clip(tmp_path: Path, pool: bool | str, quick: bool) -> None:
    model, settings = original(pool, quick)
    system = imported(tmp_path, model, settings)
    pixels, ids = theirs(system)
    rows, found = batch(system), model(pixels, ids)
    found["image_features"] = found["image_features"].flatten(1)  # two poolers leave their one query as an axis
    states = {name: system.encode(name, rows) for name in ("text", "image")}
    pooled, _ = system.poolers["image"](states["image"])
    _, tokens_BQD = model._encode_image(pixels)
    torch.testing.assert_close(pooled.hidden, tokens_BQD.flatten(0, 1), **EXACT)
    assert pooled.hidden.std() > 0.1
    _, words_BLD = model._encode_text(ids)
    ends = np.cumsum(states["text"].lengths)
    for row, (end, length) in enumerate(zip(ends, states["text"].lengths, strict=True)):
        ours = states["text"].hidden[end - length : end - 1]
        torch.testing.assert_close(ours, words_BLD[row, : length - 1], **EXACT)
    for name in ("image", "text"):
        vectors = system.embed(samples(), [name])
        torch.testing.assert_close(vectors, found[f"{name}_features"], **EXACT)
        assert float((vectors @ vectors.T).min()) < 0.97
    terms = system(rows, Progress(0, 0.0)).terms
    contrast, caption = open_clip.CoCaLoss(2.0, 1.0)(**found)
    torch.testing.assert_close(terms["align_text_image"].mean(), contrast, **EXACT)
    torch.testing.assert_close(2 * terms["caption"].mean(), caption, **EXACT)
    assert terms["caption"].weight == 2.0 and terms["align_text_image"].weight == 1.0


@torch.no_grad()
@pytest.mark.parametrize(("pool", "quick"), KINDS[:2])
def test_captions_and_their_logits_equal_those_of_open_clip(tmp_path: Path, pool: bool | str, quick: bool) -> None:
    """Ours are written over caches, theirs by running everything again for each token."""
    model, settings = original(pool, quick)
    system = imported(tmp_path, model, settings)
    pixels, ids = theirs(system)
    rows = batch(system)
    lengths = rows.views["text"].lengths - 2  # neither [EOS] nor [CLS] is asked for what follows
    logits: list[torch.Tensor] = []
    hook = system.next_word.register_forward_hook(lambda module, inputs, output: logits.append(output))
    system(rows, Progress(0, 0.0))
    hook.remove()
    expected = model(pixels, ids)["logits"]
    for row, piece in enumerate(logits[0].split(lengths.tolist())):
        torch.testing.assert_close(piece, expected[row, : len(piece)], **EXACT)
    written = torch.full((len(CAPTIONS), 1), system.tokenizer.bos)
    for _ in range(11):
        following = model(pixels, written, output_labels=False)["logits"][:, -1]
        written = torch.cat([written, following.argmax(dim=-1, keepdim=True)], dim=1)
    texts = system.generate_text(samples(), ["image"], Sampling(limit=11))
    assert texts == [system.tokenizer.decode(row[1:].tolist()) for row in written]
    assert len(set(texts)) > 1 and all(texts)


@pytest.mark.parametrize(("part", "changes", "message"), [
    ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg has hf_model_name 'roberta-base'"),
    ("text_cfg", {"embed_cls": False}, "embed_cls in text_cfg; this one has not"),
    ("vision_cfg", {"attentional_pool": False}, "a CoCa has attentional_pool True, cascade, parallel"),
    ("multimodal_cfg", {"heads": 4}, "2 attention heads in text_cfg and 4 in multimodal_cfg"),
])
def test_other_networks_are_refused(tmp_path: Path, part: str, changes: dict[str, Any], message: str) -> None:
    model, settings = original()
    settings[part].update(changes)
    with pytest.raises(UserError, match=message):
        imported(tmp_path, model, settings)


def test_a_file_without_settings_is_refused(tmp_path: Path) -> None:
    model, settings = original()
    folder = saved(tmp_path / "theirs", model, settings)
    with pytest.raises(UserError, match="comes without the settings of a CoCa"):
        import_checkpoint(Import(folder / "open_clip_pytorch_model.bin", "coca", tmp_path / "ours", folder))
