"""BLIP through `opt import` at random weights: states, matching, captioning and generation as transformers has them,
and the authors' one file."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.plan import BatchPlan
from opt.data.record import Picture, Sample
from opt.nn.sampling import Sampling
from opt.systems.blip import BLIP
from opt.systems.blip.rows import WRITING
from opt.systems.system import Progress
from opt.weights.importing import Import, import_checkpoint

transformers = pytest.importorskip("transformers")

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "red", "blue", "star", "and", "ring"]
DEC, ENC, SEP = len(VOCABULARY), len(VOCABULARY) + 1, 3
CAPTIONS = ["a red star", "blue and red and a star and a ring", "ring"]
SIZE, PATCH, POSITIONS = 32, 8, 24
EXACT = {"rtol": 0, "atol": 1e-4}


def words_file(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def loud(model: torch.nn.Module) -> Any:
    """Random weights with states of a trained network's magnitude, norms and biases away from 1 and 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.6 if "cross" in name or "position" in name else 0.2)
            elif name.endswith("bias") or "norm" in name.lower():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def original(kind: str) -> Any:
    torch.manual_seed(0)
    text = {"vocab_size": len(VOCABULARY) + 2, "hidden_size": 32, "encoder_hidden_size": 48, "intermediate_size": 64,
            "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": POSITIONS,
            "label_smoothing": 0.1, "bos_token_id": DEC, "sep_token_id": SEP, "pad_token_id": 0, "eos_token_id": SEP}
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
              "image_size": SIZE, "patch_size": PATCH}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=20,
                                     label_smoothing=0.1)
    model = loud(getattr(transformers, kind)(config))
    if kind == "BlipForConditionalGeneration":  # it writes words, not special tokens, and not always the same
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[[0, 1, 2, 4, DEC, ENC]] -= 50
            model.text_decoder.cls.predictions.bias[[SEP, VOCABULARY.index("star")]] -= 2
    return model


def imported(kind: str, tmp_path: Path) -> tuple[BLIP, Any]:
    model = original(kind)
    model.save_pretrained(tmp_path / "theirs")
    words_file(tmp_path / "theirs")
    import_checkpoint(Import(tmp_path / "theirs", "blip", tmp_path / "ours"))
    return from_pretrained(tmp_path / "ours"), model


def samples() -> list[Sample]:
    made = []
    for number, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(number).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
        written = io.BytesIO()
        Image.fromarray(pixels).save(written, "JPEG", quality=95)
        made.append(Sample(str(number), (Picture(SIZE, SIZE, jpeg=written.getvalue()),), caption=caption))
    return made


def pixels(system: BLIP) -> torch.Tensor:
    """The pictures as transformers takes them, out of our patches: (B, 3, SIZE, SIZE)."""
    table, side = system.preparer().inputs(samples(), ["image"]).patches, SIZE // PATCH
    embedder = system.encoders.towers["image"].embedder
    values_PF = (table.pixels.float() / 255 - embedder.mean) / embedder.deviation
    return values_PF.view(-1, side, side, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE)


def ids(system: BLIP, first: int, texts: list[str] = CAPTIONS) -> tuple[torch.Tensor, torch.Tensor]:
    """`first` words [SEP], padded, and which places are real."""
    rows = [torch.tensor([first, *system.tokenizer.encode(text), SEP]) for text in texts]
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids_BL, torch.arange(ids_BL.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def states(system: BLIP, modality: str) -> torch.Tensor:
    return system.encode(modality, system.preparer().inputs(samples(), [modality])).hidden


def training(system: BLIP) -> Any:
    numbers = np.arange(len(CAPTIONS))
    plan = BatchPlan(numbers, 0 * numbers, np.full((len(numbers), 2), -1), numbers.astype(np.uint64), 0, 0, 3)
    return system.preparer()(dict(enumerate(samples())), plan)


@torch.no_grad()
def test_states_matching_and_cosines_equal_those_of_transformers(tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    system, theirs = imported("BlipForImageTextRetrieval", tmp_path)
    shown = capsys.readouterr().out
    assert "not used: nothing" in shown and "blocks.0.writing_attention.query.weight" in shown
    assert (system.tokenizer.bos, system.tokenizer.enc, system.tokenizer.eos) == (DEC, ENC, SEP)
    ids_BL, valid = ids(system, system.tokenizer.cls)
    plain = theirs(input_ids=ids_BL, attention_mask=valid.long(), pixel_values=pixels(system), use_itm_head=False)
    torch.testing.assert_close(states(system, "image"), plain.last_hidden_state.flatten(0, 1), **EXACT)
    torch.testing.assert_close(states(system, "text"), plain.question_embeds[valid], **EXACT)
    cosines = system.embed(samples(), ["image"]) @ system.embed(samples(), ["text"]).T
    torch.testing.assert_close(cosines, plain.itm_score, **EXACT)
    ids_BL, valid = ids(system, ENC)
    judged = theirs(input_ids=ids_BL, attention_mask=valid.long(), pixel_values=pixels(system), use_itm_head=True)
    parts = {name: system.alone(samples(), name) for name in ("text", "image")}
    rows = dict.fromkeys(parts, np.arange(len(CAPTIONS)))
    torch.testing.assert_close(system.pooled(parts), judged.question_embeds[:, 0], **EXACT)
    torch.testing.assert_close(system.fuse(parts, rows), judged.itm_score[:, 1], **EXACT)
    torch.testing.assert_close(system.match_probability(parts, rows), judged.itm_score.softmax(1)[:, 1], **EXACT)
    assert judged.itm_score.std() > 0.1 and plain.question_embeds.std() > 0.5
    for name, tensor in system.encoders.state_dict().items():
        assert torch.equal(system.twin.copy.state_dict()[name], tensor), "the twin begins as a copy"


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["", "a picture of "])
def test_captioning_loss_logits_and_generation_equal_those_of_transformers(tmp_path: Path, prompt: str) -> None:
    system, theirs = imported("BlipForConditionalGeneration", tmp_path)
    assert system.config.prompt == "a picture of ", "as the authors' captioners were tuned"
    system.config = dataclasses.replace(system.config, prompt=prompt)
    ids_BL, valid = ids(system, DEC, [prompt + caption for caption in CAPTIONS])
    labels = ids_BL.masked_fill(~valid, -100)
    given = 1 + len(system.tokenizer.encode(prompt))
    labels[:, :given] = -100
    shown = {"pixel_values": pixels(system), "attention_mask": valid.long()}
    expected = theirs(input_ids=ids_BL, labels=labels, **shown)
    batch = training(system)
    output = system(batch, Progress(0, 0.0))
    torch.testing.assert_close(output.terms["language"].mean(), expected.loss, **EXACT)
    words = system.network.words(batch.text, batch.views[WRITING], DEC)
    context = system.encoders.read("image", batch)
    written = system.network.onto(words, context, np.arange(len(CAPTIONS)), writing=True)
    real = valid.clone()
    real[torch.arange(len(real)), valid.sum(1) - 1] = False  # nothing is written after the end
    torch.testing.assert_close(system.word_logits(written.hidden), expected.logits[real], **EXACT)
    start = torch.tensor([[DEC, *system.tokenizer.encode(prompt), SEP]] * len(CAPTIONS))
    longest = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1}
    theirs_BL = theirs.generate(pixels(system), input_ids=start, attention_mask=torch.ones_like(start), **longest)
    captions = [system.tokenizer.decode(row[given:].tolist()) for row in theirs_BL]
    assert system.generate_text(samples(), ["image"], Sampling(limit=12)) == captions
    assert len(set(captions)) > 1


@torch.no_grad()
def test_blip_model_gives_both_towers_and_not_its_own_projections(tmp_path: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    system, theirs = imported("BlipModel", tmp_path)
    ids_BL, valid = ids(system, system.tokenizer.cls)
    image = theirs.vision_model(pixels(system)).last_hidden_state
    text = theirs.text_model(input_ids=ids_BL, attention_mask=valid.long()).last_hidden_state
    torch.testing.assert_close(states(system, "image"), image.flatten(0, 1), **EXACT)
    torch.testing.assert_close(states(system, "text"), text[valid], **EXACT)
    unused = capsys.readouterr().out.partition("not in the checkpoint")[0]
    assert "visual_projection.weight" in unused and "text_model.pooler.dense.bias" in unused


def authors_file(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A pretraining checkpoint in the authors' layout, made of two of transformers' with shared tensors."""
    reader, writer = original("BlipForImageTextRetrieval"), original("BlipForConditionalGeneration")
    names = {"vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
             "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
             "vision_model.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
             "vision_model.post_layernorm": "visual_encoder.norm",
             "vision_model.encoder.layers": "visual_encoder.blocks",
             "layer_norm": "norm", "self_attn.projection": "attn.proj", "self_attn": "attn"}

    def renamed(name: str) -> str:
        for theirs, authors in names.items():
            name = name.replace(theirs, authors)
        return name

    state = {renamed(name): tensor.clone() for name, tensor in reader.state_dict().items()}
    decoder = {name: tensor.clone() for name, tensor in writer.state_dict().items() if name.startswith("text_decoder")}
    for name in decoder:
        if "attention.self" in name.replace("crossattention.self", "") or ".attention.output" in name:
            continue
        if (same := name.replace("text_decoder.bert", "text_encoder")) in state:
            decoder[name] = state[same]
    decoder["text_decoder.cls.predictions.decoder.weight"] = state["text_encoder.embeddings.word_embeddings.weight"]
    state |= decoder
    for name in [name for name in state if not name.startswith(("text_decoder", "itm_head"))]:
        module, _, rest = name.partition(".")
        state[f"{module}_m.{rest}"] = state[name] + 0.5
    queues = {name: torch.nn.functional.normalize(torch.randn(20, 6), dim=0) for name in ("image_queue", "text_queue")}
    state |= queues | {"queue_ptr": torch.tensor([4]), "temp": torch.tensor(0.05),
                       "text_encoder.embeddings.position_ids": torch.arange(POSITIONS)[None]}
    path = tmp_path / "model_base.pth"
    torch.save({"model": state, "epoch": 19}, path)
    return path, state


def heads_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' heads are 64 wide; a test's are not."""
    import opt.weights.blip as importer

    heads = {"heads": {importer.TEXT: 4, importer.IMAGE: 3}, "image_epsilon": 1e-5, "sight": {}}
    monkeypatch.setattr(importer, "_authors", lambda source: heads)


@torch.no_grad()
def test_the_authors_file_fills_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    path, state = authors_file(tmp_path)
    heads_of_16(monkeypatch)
    import_checkpoint(Import(path, "blip", tmp_path / "ours", words_file(tmp_path)))
    shown = capsys.readouterr().out
    assert "new in the model: nothing" in shown
    assert "not used: 1\n  text_encoder.embeddings.position_ids" in shown
    system = from_pretrained(tmp_path / "ours")
    assert isinstance(system, BLIP) and system.config.prompt == "" and system.config.ring_rows == 6
    assert system.contrast.temperature().item() == pytest.approx(20)
    torch.testing.assert_close(system.contrast.ring.text, state["text_queue"].T)
    assert system.contrast.ring.has_image.all() and int(system.contrast.ring.place) == 4
    table = system.twin.copy.towers["text"].embedder.token.weight
    torch.testing.assert_close(table, system.network.embedder.token.weight + 0.5)
    theirs = original("BlipForImageTextRetrieval")
    ids_BL, valid = ids(system, ENC)
    judged = theirs(input_ids=ids_BL, attention_mask=valid.long(), pixel_values=pixels(system), use_itm_head=True)
    parts = {name: system.alone(samples(), name) for name in ("text", "image")}
    torch.testing.assert_close(system.fuse(parts, dict.fromkeys(parts, np.arange(3))), judged.itm_score[:, 1], **EXACT)


def test_networks_that_are_not_blip_s_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = authors_file(tmp_path)
    heads_of_16(monkeypatch)
    words_file(tmp_path)
    cases = (
        ({"text_decoder.bert.encoder.layer.1.output.dense.bias": torch.zeros(32)}, "differ in what belongs .*s.1.feed"),
        ({"text_decoder.cls.predictions.decoder.weight": torch.zeros(15, 32)}, "decoder.weight is not"),
    )
    for change, message in cases:
        torch.save({"model": state | change}, path)
        with pytest.raises(UserError, match=message):
            import_checkpoint(Import(path, "blip", tmp_path / "ours", tmp_path))
    torch.save({"model": {"visual_encoder.cls_token": torch.zeros(1, 1, 48)}}, path)
    with pytest.raises(UserError, match="neither text_encoder nor text_decoder"):
        import_checkpoint(Import(path, "blip", tmp_path / "ours", tmp_path))
