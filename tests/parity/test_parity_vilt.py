"""ViLT through `opt import` at random weights: states, pooled vectors, words, matching, pixels as in transformers.

Pictures have three shapes. Transformers pads them to the largest, and sees the patches of the largest in random order;
its tokens are put back in order, and only real ones compared.
"""

import io
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
from opt.systems.system import Progress
from opt.systems.vilt import ViLT
from opt.weights.importing import Import, import_checkpoint

transformers = pytest.importorskip("transformers")

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]", "a", "red", "blue", "star", "##s", "and",
              "circle", "on", "the", "left"]
CAPTIONS = ["a red star on the left", "blue stars and circles and a star", "red"]
SIDES = (50, 70), (80, 30), (32, 32)
"""Height and width of the stored pictures; the second is longer than may be."""
GRIDS = (4, 5), (6, 2), (4, 4)
"""What they become, in patches."""
SIZE, PATCH, POSITIONS = 32, 8, 16
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-4}


def original(kind: str, **changes: Any) -> Any:
    """A small model of transformers with weights away from 0, and norms and biases away from 1 and 0."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(VOCABULARY), "max_position_embeddings": POSITIONS, "hidden_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "intermediate_size": 80, "image_size": SIZE, "patch_size": PATCH,
        "max_image_length": -1, "layer_norm_eps": 1e-3, "initializer_range": 0.2,
    }
    model = getattr(transformers, kind)(transformers.ViltConfig(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(changes.get("initializer_range", 0.2) * torch.randn_like(parameter))
    return model.eval()


def imported(model: Any, folder: Path, vocabulary: list[str] = VOCABULARY) -> ViLT:
    model.save_pretrained(folder / "theirs")
    (folder / "theirs/vocab.txt").write_text("\n".join(vocabulary) + "\n")
    import_checkpoint(Import(folder / "theirs", "vilt", folder / "ours"))
    return from_pretrained(folder / "ours")


def samples() -> list[Sample]:
    made = []
    for number, (caption, sides) in enumerate(zip(CAPTIONS, SIDES, strict=True)):
        noise = np.random.default_rng(number).integers(256, size=(*sides, 3), dtype=np.uint8)
        written = io.BytesIO()
        Image.fromarray(noise).save(written, "JPEG", quality=95)
        made.append(Sample(str(number), (Picture(sides[1], sides[0], jpeg=written.getvalue()),), caption=caption))
    return made


def joined(system: ViLT) -> Batch:
    """Each caption with its picture."""
    rows = system.preparer()
    packer = rows.packer()
    for sample in samples():
        tables, _ = rows.tables(packer, sample, ("text", "image"))
        rows.join(packer, {name: part for name, (part,) in tables.items()})
    return packer.batch(["0", "1", "2"], {}, {}, {})


def pixels(system: ViLT, batch: Batch) -> dict[str, torch.Tensor]:
    """The pictures of our patches, padded by noise."""
    values_PF = (batch.patches.pixels.float() / 255 - system.image.mean) / system.image.deviation
    height, width = (PATCH * max(grid[side] for grid in GRIDS) for side in range(2))
    pixel_values, mask = torch.randn(len(GRIDS), 3, height, width), torch.zeros(len(GRIDS), height, width).long()
    for number, (rows, columns) in enumerate(GRIDS):
        before = sum(one * other for one, other in GRIDS[:number])
        grid = values_PF[before : before + rows * columns].view(rows, columns, 3, PATCH, PATCH)
        area = slice(rows * PATCH), slice(columns * PATCH)
        pixel_values[number, :, *area] = grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        mask[number][area] = 1
    return {"pixel_values": pixel_values, "pixel_mask": mask}


def words(system: ViLT, ids: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Captions padded, or other ids."""
    tokenizer = system.tokenizer
    ids = ids or [torch.tensor([tokenizer.cls, *tokenizer.encode(text), tokenizer.sep]) for text in CAPTIONS]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(each) for each in ids])
    return {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}


def in_order(given: dict[str, torch.Tensor], hidden_BLD: torch.Tensor, seen: list[Any]) -> torch.Tensor:
    """Their real tokens as ours lie: words, class token, patches row by row."""
    text = given["input_ids"].shape[1]
    places = seen[-1][2][0]
    pieces = []
    for number, (rows, columns) in enumerate(GRIDS):
        valid = int(given["attention_mask"][number].sum())
        row, column = places[number, : rows * columns].unbind(1)
        order = torch.argsort(row * columns + column)
        states = hidden_BLD[number]
        pieces += [states[:valid], states[text : text + 1], states[text + 1 :][order]]
    return torch.cat(pieces)


def watched(core: Any) -> list[Any]:
    """What `visual_embed` returns from now on: its last entry says which patches were seen in which order."""
    seen: list[Any] = []
    embed = core.embeddings.visual_embed

    def watching(*given: Any, **named: Any) -> Any:
        seen.append(embed(*given, **named))
        return seen[-1]

    core.embeddings.visual_embed = watching
    return seen


@torch.no_grad()
def test_states_and_pooled_vectors_equal_those_of_transformers(tmp_path: Path) -> None:
    theirs = original("ViltModel")
    system = imported(theirs, tmp_path)
    batch, seen = joined(system), watched(theirs)
    given = {**words(system), **pixels(system, batch)}
    expected = theirs(**given)
    hidden_ND = system.read(batch)
    order = in_order(given, expected.last_hidden_state, seen)
    torch.testing.assert_close(hidden_ND, order, **EXACT)
    assert order.std() > 0.5 and (order[1:] - order[:-1]).abs().mean() > 0.3, "tokens differ"
    torch.testing.assert_close(system.pooler(hidden_ND[batch.views["encoder"].first]), expected.pooler_output, **EXACT)
    for name in ("last_hidden_state", "pooler_output"):
        assert not torch.allclose(theirs(**{**given, "pixel_values": -given["pixel_values"]})[name], expected[name])


@torch.no_grad()
def test_hidden_words_and_their_loss_equal_those_of_transformers(tmp_path: Path) -> None:
    theirs = original("ViltForMaskedLM")
    system = imported(theirs, tmp_path)
    numbers = np.arange(len(CAPTIONS))
    plan = BatchPlan(numbers, 0 * numbers, np.full((3, 2), -1), numbers.astype(np.uint64) + 7, 0, 0, 3)
    batch = system.preparer()(dict(enumerate(samples())), plan)
    view, target = batch.views["encoder"], batch.targets["mlm"]
    ids, labels = [], []
    for first, length in zip(view.first[::2].tolist(), view.lengths[::2].tolist(), strict=True):
        entries = view.gather[first : first + length]
        ids.append(batch.text.ids[entries[entries < len(batch.text.ids)]])
        label = torch.full_like(ids[-1], -100)
        own = (target.index >= first) & (target.index < first + length)
        label[target.index[own] - first] = target.label[own]
        labels.append(label)
    labels_BL = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    expected = theirs(**words(system, ids), **pixels(system, batch), labels=labels_BL)
    logits_MV = system.word_head(system.read(batch)[target.index], system.text.token.weight)
    torch.testing.assert_close(logits_MV, expected.logits[labels_BL != -100], **EXACT)
    assert any((each == system.tokenizer.mask).any() for each in ids) and logits_MV.std() > 0.5
    torch.testing.assert_close(system(batch, Progress(0, 0.0)).terms["mlm"].mean(), expected.loss, **EXACT)


@torch.no_grad()
def test_log_odds_of_matching_equal_the_rank_of_transformers(tmp_path: Path) -> None:
    theirs = original("ViltForImageAndTextRetrieval")
    system = imported(theirs, tmp_path)
    given = {**words(system), **pixels(system, joined(system))}
    expected = theirs(**given).logits[:, 0]
    torch.testing.assert_close(system.score(samples(), ("text", "image")), expected, **EXACT)
    turned = {name: value.roll(1, 0) if name.startswith("pixel") else value for name, value in given.items()}
    parts = {name: system.alone(samples(), name) for name in ("text", "image")}
    scores = system.fuse(parts, {"text": np.array([0, 1, 2]), "image": np.array([2, 0, 1])})
    torch.testing.assert_close(scores, theirs(**turned).logits[:, 0], **EXACT)
    assert (scores - expected).abs().min() > 1e-3


AUTHORS = {
    "vilt.embeddings.cls_token": "transformer.cls_token",
    "vilt.embeddings.position_embeddings": "transformer.pos_embed",
    "vilt.embeddings.patch_embeddings.projection": "transformer.patch_embed.proj",
    "vilt.embeddings.text_embeddings": "text_embeddings",
    "vilt.embeddings.token_type_embeddings": "token_type_embeddings",
    "vilt.encoder.layer.": "transformer.blocks.",
    "vilt.layernorm": "transformer.norm",
    "vilt.pooler": "pooler",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
"""What stands in names of transformers, and in the authors'."""


def as_the_authors_have_it(model: Any) -> dict[str, torch.Tensor]:
    """The trunk of a model under the names of a .ckpt."""
    state = dict(model.state_dict())
    for name in [name for name in state if ".attention.query" in name]:
        three = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(three)
    renamed = {}
    for name, tensor in state.items():
        for theirs, authors in AUTHORS.items():
            name = name.replace(theirs, authors)
        renamed[name] = tensor
    return renamed


@torch.no_grad()
@pytest.mark.parametrize("fine_tuned", [True, False])
def test_the_authors_layout_is_the_same_network(tmp_path: Path, fine_tuned: bool) -> None:
    settings = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "layer_norm_eps": 1e-12}
    theirs = original("ViltForImageAndTextRetrieval", initializer_range=0.1, **settings)
    state = as_the_authors_have_it(theirs)
    state |= {"itm_score.fc.weight": torch.randn(2, 128), "itm_score.fc.bias": torch.randn(2)}
    if not fine_tuned:
        difference = state["itm_score.fc.weight"].diff(dim=0), state["itm_score.fc.bias"].diff(dim=0)
        theirs.rank_output.weight.copy_(difference[0]), theirs.rank_output.bias.copy_(difference[1])
        state = {name: tensor for name, tensor in state.items() if "rank_output" not in name}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "vilt.ckpt")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    import_checkpoint(Import(tmp_path / "vilt.ckpt", "vilt", tmp_path / "ours", tmp_path / "vocab.txt"))
    system = from_pretrained(tmp_path / "ours")
    assert isinstance(system, ViLT)
    expected = theirs(**words(system), **pixels(system, joined(system))).logits[:, 0]
    torch.testing.assert_close(system.score(samples(), ("text", "image")), expected, **EXACT)


def test_pixels_and_their_shapes_are_those_of_the_processor(tmp_path: Path) -> None:
    system = imported(original("ViltModel"), tmp_path)
    batch = joined(system)
    pictures = [Image.open(io.BytesIO(sample.pictures[0].jpeg or b"")) for sample in samples()]
    processor = transformers.ViltImageProcessorPil(size={"shortest_edge": SIZE}, size_divisor=PATCH)
    theirs, ours = processor(pictures, return_tensors="pt"), pixels(system, batch)
    assert torch.equal(theirs["pixel_mask"], ours["pixel_mask"])
    mask = ours["pixel_mask"][:, None].bool().expand_as(ours["pixel_values"])
    torch.testing.assert_close(theirs["pixel_values"][mask], ours["pixel_values"][mask], rtol=0, atol=1 / 127)


def test_what_a_layout_has_not_is_new_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = [word for word in VOCABULARY if word not in ("[BOS]", "[EOS]")]
    theirs = original("ViltForMaskedLM", vocab_size=len(plain))
    system = imported(theirs, tmp_path, plain)
    said = capsys.readouterr().out
    assert "match_head.weight" in said and "text.token.weight" in said and "pooler" not in said
    assert system.tokenizer.size == len(plain) + 2
    table = theirs.vilt.embeddings.text_embeddings.word_embeddings.weight
    assert torch.equal(system.text.token.weight[: len(plain)], table)


def test_networks_that_are_not_vilts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hidden_act is 'relu', expected 'gelu'"):
        imported(original("ViltModel", hidden_act="relu"), tmp_path)
    untied = original("ViltForMaskedLM")
    state = {**untied.state_dict(), "mlm_score.decoder.weight": torch.zeros(len(VOCABULARY), 48)}
    torch.save(state, tmp_path / "theirs/pytorch_model.bin")
    (tmp_path / "theirs/model.safetensors").unlink()
    untied.config.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="word vectors of its own"):
        import_checkpoint(Import(tmp_path / "theirs", "vilt", tmp_path / "ours"))
