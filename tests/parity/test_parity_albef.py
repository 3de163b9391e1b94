"""ALBEF through `opt import` at random weights: states, scores, all losses and the queue as in torchmultimodal.

torchmultimodal's parts have names of its own; `authors` writes them as the authors' .pth files have them.
"""

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.batch import Batch
from opt.data.plan import BatchPlan
from opt.data.record import Picture, Sample
from opt.systems import albef
from opt.systems.albef import ALBEF
from opt.systems.shared.matching import Pairing
from opt.systems.system import Output, Progress
from opt.weights.importing import Import, import_checkpoint

model = pytest.importorskip("torchmultimodal.models.albef.model")
bert = pytest.importorskip("transformers.models.bert.modeling_bert")

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]", "a", "red", "blue", "star", "##s", "and",
              "circle", "on", "the", "left"]
CAPTIONS = ["A red star on the left", "blue stars and circles and a star", "red", "the circle"]
PICTURES = ["0", "1", "1", "2"]
"""The second and the third caption are of one picture."""
WIDTH, SPACE, SIZE, PATCH, POSITIONS, LAYERS, QUEUE = 128, 20, 32, 8, 16, 2, 12
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-4}

NAMES = [
    (r"^albef_model\.vision_encoder(_m)?\.encoder\.", r"visual_encoder\1."),
    (r"^albef_model\.text_encoder(_m)?\.", r"text_encoder\1.bert."),
    (r"^albef_model\.multimodal_encoder(_m)?\.layer\.(\d+)",
     lambda match: f"text_encoder{match[1] or ''}.bert.encoder.layer.{int(match[2]) + LAYERS}"),
    (r"\.class_token", ".cls_token"), (r"\.conv_proj", ".patch_embed.proj"),
    (r"\.encoder\.pos_embedding", ".pos_embed"),
    (r"\.encoder\.layers\.encoder_layer_(\d+)", r".blocks.\1"), (r"\.encoder\.ln\.", ".norm."), (r"\.ln_", ".norm"),
    (r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out_proj", ".attn.proj"),
    (r"\.mlp\.0", ".mlp.fc1"), (r"\.mlp\.3", ".mlp.fc2"), (r"\.layer_norm\.", ".LayerNorm."),
    (r"\bcross_attention", "crossattention"), (r"attention\.(query|key|value)", r"attention.self.\1"),
    (r"attention\.output", "attention.output.dense"), (r"attention_layernorm", "attention.output.LayerNorm"),
    (r"feedforward\.model\.0", "intermediate.dense"), (r"feedforward\.model\.2", "output.dense"),
    (r"feedforward_layernorm", "output.LayerNorm"),
]
"""What the authors call a part, by what torchmultimodal calls it; one after the other."""


class Original(nn.Module):
    """torchmultimodal's model, with the two heads that it leaves to others."""

    def __init__(self) -> None:
        super().__init__()
        from torchmultimodal.models.albef.image_encoder import ALBEFVisionEncoder
        from torchmultimodal.models.albef.multimodal_encoder import ALBEFMultimodalEncoder
        from torchmultimodal.modules.encoders.bert_text_encoder import bert_text_encoder

        torch.manual_seed(0)
        vision = ALBEFVisionEncoder(SIZE, PATCH, 3, WIDTH // 64, WIDTH, 96)
        text = bert_text_encoder(WIDTH, LAYERS, WIDTH // 64, 80, 0.0, vocab_size=len(VOCABULARY),
                                 max_position_embeddings=POSITIONS)
        fusion = ALBEFMultimodalEncoder(WIDTH, LAYERS + 1, WIDTH // 64, 80)
        self.all = model.ALBEFModelWithSimilarity(model.ALBEFModel(vision, text, fusion, momentum=1.0),
                                                  *(nn.Linear(WIDTH, SPACE) for _ in range(2)), SPACE, QUEUE, temp=0.2)
        settings = bert.BertConfig(hidden_size=WIDTH, vocab_size=len(VOCABULARY), layer_norm_eps=1e-12)
        self.words = nn.ModuleList(bert.BertLMPredictionHead(settings) for _ in range(2))
        self.match = nn.Linear(WIDTH, 2)
        for head, twin in zip(self.words, ("", "_m"), strict=True):
            encoder = getattr(self.all.albef_model, f"text_encoder{twin}")
            head.decoder.weight, head.decoder.bias = encoder.embeddings.word_embeddings.weight, head.bias
        with torch.no_grad():
            for parameter in self.parameters():  # also the twin's, which then differ
                if parameter.ndim:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        self.all.idx_queue[:] = torch.arange(100, 100 + QUEUE)
        self.all.queue_ptr[0] = len(CAPTIONS)
        self.eval()

    def states(self, twin: str, pixels: Tensor, ids_BL: Tensor, valid_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of pictures, texts and texts that look at their pictures."""
        image, text, fusion = (getattr(self.all.albef_model, f"{part}_encoder{twin}")
                               for part in ("vision", "text", "multimodal"))
        image_BPD, text_BLD = image(pixels), text(ids_BL, valid_BL.long()).last_hidden_state
        return image_BPD, text_BLD, fusion(text_BLD, valid_BL.long(), image_BPD)


def authors(original: Original) -> dict[str, Tensor]:
    """The state as the authors save it after pretraining."""
    state = {}
    for name, tensor in original.all.state_dict().items():
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        state[name] = tensor.clone()
    for head, twin in zip(original.words, ("", "_m"), strict=True):
        state |= {f"text_encoder{twin}.cls.predictions.{name}": tensor for name, tensor in head.state_dict().items()}
        state[f"text_encoder{twin}.bert.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    del state["idx_queue"]
    return state | {f"itm_head.{name}": tensor for name, tensor in original.match.state_dict().items()}


def imported(state: dict[str, Tensor], folder: Path, vocabulary: list[str] = VOCABULARY) -> ALBEF:
    torch.save({"model": state, "config": {"temp": 0.07}, "epoch": 29}, folder / "ALBEF.pth")
    words = folder / "vocab.txt"
    words.write_text("\n".join(vocabulary) + "\n")
    import_checkpoint(Import(folder / "ALBEF.pth", "albef", folder / "ours", words))
    return from_pretrained(folder / "ours").eval()


def samples() -> list[Sample]:
    made = []
    for caption, key in zip(CAPTIONS, PICTURES, strict=True):
        pixels = np.random.default_rng(int(key)).integers(256, size=(9, 7, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((70, 50)).save(file, "JPEG", quality=95)
        made.append(Sample(key, (Picture(50, 70, jpeg=file.getvalue()),), caption=caption))
    return made


def training_batch(system: ALBEF) -> Batch:
    rows = np.arange(len(CAPTIONS))
    plan = BatchPlan(rows, 0 * rows, np.full((len(rows), 2), -1), rows.astype(np.uint64), 0, 0, len(rows))
    preparer = system.preparer()
    assert system.config.sight.least_area == 0.2  # trained on parts; here on the whole, as the other library is given
    preparer.config = dataclasses.replace(system.config, sight=dataclasses.replace(system.config.sight, least_area=1.0))
    return preparer(dict(enumerate(samples())), plan)


def pixels(system: ALBEF, batch: Batch) -> Tensor:
    """The pictures as the other library takes them, out of our patches: (B, 3, SIZE, SIZE)."""
    embedder, side = system.encoders.towers["image"].embedder, SIZE // PATCH
    values_PF = (batch.patches.pixels.float() / 255 - embedder.mean) / embedder.deviation
    grid = values_PF.view(-1, side, side, 3, PATCH, PATCH)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE)


def texts(batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
    """Ids of some sequences, padded, and which places are real."""
    view = batch.views["text"]
    rows = batch.text.ids[view.gather].split(view.lengths.tolist())[part]
    ids_BL = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids_BL, torch.arange(ids_BL.shape[1]) < lengths[:, None]


@pytest.fixture(scope="module")
def original() -> Original:
    return Original()


@pytest.fixture(scope="module")
def system(original: Original, tmp_path_factory: pytest.TempPathFactory) -> ALBEF:
    return imported(authors(original), tmp_path_factory.mktemp("albef"))


@torch.no_grad()
@pytest.mark.parametrize("twin", ["", "_m"])
def test_states_are_those_of_torchmultimodal(original: Original, system: ALBEF, twin: str) -> None:
    batch, encoders = training_batch(system), system.kept if twin else system.encoders
    ids_BL, valid_BL = texts(batch, slice(len(CAPTIONS)))
    image, text, fused = original.states(twin, pixels(system, batch), ids_BL, valid_BL)
    ours = {name: encoders.encode(name, batch) for name in ("text", "image")}
    own = ours["text"].take(np.arange(len(CAPTIONS)))
    torch.testing.assert_close(ours["image"].hidden, image.flatten(0, 1), **EXACT)
    torch.testing.assert_close(own.hidden, text[valid_BL], **EXACT)
    found = encoders.fuse(own, ours["image"], np.arange(len(CAPTIONS)))
    torch.testing.assert_close(found.hidden, fused[valid_BL], **EXACT)
    assert min(each.std() for each in (image, text, fused)) > 0.5
    other = encoders.fuse(own, ours["image"], np.array([3, 2, 1, 0]))
    assert (other.hidden - found.hidden).abs().max() > 0.01  # the picture matters


@torch.no_grad()
def test_vectors_and_scores_are_those_of_torchmultimodal(original: Original, system: ALBEF) -> None:
    batch = training_batch(system)
    image, text, fused = original.states("", pixels(system, batch), *texts(batch, slice(len(CAPTIONS))))
    for name, states, project in (("image", image, original.all.vision_proj), ("text", text, original.all.text_proj)):
        torch.testing.assert_close(system.embed(samples(), [name]), F.normalize(project(states[:, 0]), dim=-1), **EXACT)
    torch.testing.assert_close(system.score(samples(), ["text", "image"]), original.match(fused[:, 0])[:, 1], **EXACT)
    parts = {name: system.alone(samples(), name) for name in ("text", "image")}
    torch.testing.assert_close(system.pooled(parts), fused[:, 0], **EXACT)
    assert system.cosine_weight == 0


def trained(system: ALBEF, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[Output, Pairing]:
    """What a forward gives at the height of distillation, and the pairs that it drew."""
    drawn = []
    pair_up = albef.pair_up
    monkeypatch.setattr(albef, "pair_up", lambda *given: drawn.append(pair_up(*given)) or drawn[-1])
    return system(batch, Progress(9, 1.0)), drawn[0]


@torch.no_grad()
def test_losses_and_queue_are_those_of_torchmultimodal(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmultimodal.modules.losses import albef as losses

    system = imported(authors(original), tmp_path)
    batch, alpha = training_batch(system), system.config.distillation
    output, pairs = trained(system, batch, monkeypatch)
    found = {name: float(term.mean()) for name, term in output.terms.items()}
    own, seen = texts(batch, slice(len(CAPTIONS))), pixels(system, batch)
    image, text, _ = original.states("", seen, *own)

    theirs = original.all(seen, *own[:1], own[1].long(), torch.tensor([int(key) for key in PICTURES]))
    contrast = losses.ImageTextContrastiveLoss()(*theirs.similarity, theirs.sim_targets, alpha)
    assert found["align_text_image"] == pytest.approx(float(contrast), abs=1e-4)

    assert len(pairs.text) == 3 * len(CAPTIONS)
    fused = original.all.albef_model.multimodal_encoder(text[pairs.text], own[1][pairs.text].long(),
                                                        image[pairs.context])
    label = torch.tensor([1, 0, 0]).repeat_interleave(len(CAPTIONS))
    match = F.cross_entropy(original.match(fused[:, 0]), label)
    assert found["match"] == pytest.approx(float(match), abs=1e-4)

    hidden, valid = texts(batch, slice(len(CAPTIONS), None))
    online, kept = (head(original.states(twin, seen, hidden, valid)[2])
                    for head, twin in zip(original.words, ("", "_m"), strict=True))
    label = torch.full_like(hidden[valid], -100)
    label[batch.targets["mlm"].index] = batch.targets["mlm"].label
    label_BL = torch.full_like(hidden, -100).masked_scatter(valid, label)
    # Theirs compares each place with the label behind it.
    words = losses.CausalLanguageModelingLoss()(F.pad(label_BL, (1, 0), value=-100), F.pad(online, (0, 0, 0, 1)),
                                                F.pad(kept, (0, 0, 0, 1)), alpha)
    assert found["mlm"] == pytest.approx(float(words.sum() / (label != -100).sum()), abs=1e-4)

    system.after_step([output.carry], torch.tensor(True))
    ring = system.contrast.ring
    assert int(ring.place) == int(original.all.queue_ptr) == 2 * len(CAPTIONS)
    for name in ("image", "text"):
        torch.testing.assert_close(ring.get_buffer(name), getattr(original.all, f"{name}_queue").T, **EXACT)
    assert ring.get_buffer("has_image").all() and ring.get_buffer("has_text").all()


def test_fine_tuned_checkpoints_have_no_word_head_and_name_bert_otherwise(
    original: Original, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name.replace(".bert.", "."): tensor for name, tensor in authors(original).items() if ".cls." not in name}
    filled = 5
    state["idx_queue"] = torch.tensor([[*range(filled), *[-100] * (QUEUE - filled)]])
    system = imported(state, tmp_path)
    said = capsys.readouterr().out
    assert "new in the model: 10\n" in said and said.count("word_head.") == 10 and "position_ids" in said
    ring = system.contrast.ring
    assert ring.get_buffer("has_text").tolist() == [place < filled for place in range(QUEUE)]
    assert (ring.get_buffer("picture") == -1).all()
    torch.testing.assert_close(system.kept.word_head.transform.weight, system.encoders.word_head.transform.weight)
    whole = from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(whole.embed(samples(), ["text"]), system.embed(samples(), ["text"]))


def test_without_momentum_parts_the_twin_is_a_copy_and_the_ring_is_empty(original: Original, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in authors(original).items()
             if "_m." not in name and "queue" not in name}
    system = imported(state, tmp_path)
    for name, tensor in system.kept.state_dict().items():
        assert torch.equal(tensor, system.encoders.state_dict()[name])
    assert not system.contrast.ring.get_buffer("has_text").any()


def test_tokens_that_the_words_lack_are_new(original: Original, tmp_path: Path) -> None:
    """BERT's own words have no [BOS] and no [EOS]."""
    lacking = [word for word in VOCABULARY if word not in ("[BOS]", "[EOS]")]
    kept = torch.tensor([VOCABULARY.index(word) for word in lacking])
    state = {name: tensor[kept] if len(tensor.shape) and len(tensor) == len(VOCABULARY) else tensor
             for name, tensor in authors(original).items()}
    system = imported(state, tmp_path, lacking)
    assert system.tokenizer.size == len(lacking) + 2
    table = system.encoders.towers["text"].embedder.token.weight
    assert torch.equal(table[:-2], state["text_encoder.bert.embeddings.word_embeddings.weight"])


def test_other_networks_are_refused(original: Original, tmp_path: Path) -> None:
    state = authors(original)
    for number in range(LAYERS):  # as BLIP's, where every layer looks at the picture
        state[f"text_encoder.bert.encoder.layer.{number}.crossattention.self.query.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match="layers that read the text alone.* as blip"):
        imported(state, tmp_path)
    with pytest.raises(UserError, match="is not that of the word vectors"):
        imported({**authors(original), "text_encoder.cls.predictions.decoder.weight": torch.zeros(2)}, tmp_path)
    with pytest.raises(UserError, match="holds no itm_head.weight"):
        imported({name: each for name, each in authors(original).items() if "itm" not in name}, tmp_path)
