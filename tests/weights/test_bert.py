"""OPT begun from BERT: states, pooled output and word logits as transformers computes them; refusals in a sentence."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import FACTS, fake_sample, fake_shards
from safetensors.torch import load_file, save_file

from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.record import Sample
from opt.data.tokenizer import Tokenizer
from opt.recipe import LoopConfig
from opt.systems.opt import OPT, OPTConfig, paper
from opt.weights import bert
from opt.weights.source import Source
from pretrain.run import PretrainConfig, pretrain

transformers = pytest.importorskip("transformers")

WORDS = ["red", "blue", "green", "circle", "square", "star", "a", "and", "the", ".", "##s", "##ed", "le", "##ft", "of"]
LINES = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
TEXTS = ["A red star.", "the blue circles and the green squares left of a star.", "left", "Red, blue, red."]
MODEL = OPTConfig(decoder_layers=1, text_positions=24)


@pytest.fixture(scope="module")
def original() -> Any:
    """A random BertForPreTraining with states, norms and biases of BERT's magnitude."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(LINES), hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=32, initializer_range=0.3,
    )
    model = transformers.BertForPreTraining(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(original, tmp_path_factory.mktemp("bert"))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(LINES) + "\n")
    return folder


def begun(folder: Path, **changes: Any) -> OPT:
    found = bert.describe(folder)
    torch.manual_seed(1)
    config = dataclasses.replace(bert.fitted(MODEL, found), **changes)
    system = OPT(config, Tokenizer.from_bert(folder), FACTS).eval()
    bert.begin(system, found)
    return system


def packed(system: OPT) -> tuple[torch.Tensor, torch.Tensor]:
    """States of all tokens, and of each text's [CLS]."""
    samples = [Sample(str(number), caption=text) for number, text in enumerate(TEXTS)]
    return system.encode(system.preparer().inputs(samples, ["text"]))


def padded(system: OPT) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same texts as transformers reads them, and which places are real."""
    rows = [[system.tokenizer.cls, *system.tokenizer.encode(text), system.tokenizer.sep] for text in TEXTS]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    valid = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": valid.long()}, valid


def assert_equal_states(original: Any, system: OPT) -> None:
    inputs, valid = padded(system)
    assert len({int(length) for length in valid.sum(1)}) > 2
    with torch.no_grad():
        expected, (hidden, _) = original.bert(**inputs), packed(system)
    torch.testing.assert_close(hidden, expected.last_hidden_state[valid], rtol=0, atol=1e-5)


def test_states_pooled_output_and_word_logits_equal_those_of_transformers(original: Any, folder: Path) -> None:
    system = begun(folder)
    assert_equal_states(original, system)
    inputs, valid = padded(system)
    with torch.no_grad():
        hidden, first = packed(system)
        theirs = original(**inputs)
        torch.testing.assert_close(
            system.pooler(first), original.bert(**inputs).pooler_output, rtol=0, atol=1e-5
        )
        logits = system.word_head(hidden, system.text.token.weight)
    expected = theirs.prediction_logits[valid]
    torch.testing.assert_close(logits[:, : len(LINES)], expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 1  # there is something to compare


def test_what_bert_has_not_keeps_its_fresh_values(folder: Path) -> None:
    system, found = begun(folder), bert.describe(folder)
    torch.manual_seed(1)
    fresh = OPT(system.config, system.tokenizer, FACTS)
    assert system.tokenizer.size == len(LINES) + 2
    assert torch.equal(system.text.token.weight[len(LINES) :], fresh.text.token.weight[len(LINES) :])
    assert not torch.equal(system.text.token.weight[: len(LINES)], fresh.text.token.weight[: len(LINES)])
    assert torch.equal(system.text_decoder.position.weight, fresh.text_decoder.position.weight)
    assert not torch.equal(system.regions.modality, fresh.regions.modality)
    assert set(bert.begin(fresh, found)) == {"text", "regions", "encoder", "pooler", "word_head"}


def test_word_vectors_are_one_tensor_for_encoder_word_head_and_text_decoder(folder: Path) -> None:
    system = begun(folder)
    size = system.tokenizer.size
    assert [name for name, parameter in system.named_parameters() if len(parameter) == size] == [
        "text.token.weight", "word_head.bias", "text_decoder.bias"
    ]
    hidden = torch.randn(2, system.config.width)
    assert system.word_head(hidden, system.text.token.weight).shape == (2, size)
    assert system.text_decoder.logits(hidden, system.text.token.weight).shape == (2, size)
    for head in (lambda: system.word_head(hidden, system.text.token.weight),
                 lambda: system.text_decoder.logits(hidden, system.text.token.weight), lambda: packed(system)[0]):
        system.zero_grad()
        head().square().sum().backward()
        assert system.text.token.weight.grad is not None and system.text.token.weight.grad.abs().sum() > 0


def test_gradients_flow_into_all_that_was_read(folder: Path) -> None:
    system = begun(folder).train()
    hidden, first = packed(system)
    (system.word_head(hidden, system.text.token.weight).square().sum() + system.pooler(first).sum()).backward()
    parts = ("text.", "encoder.", "pooler.", "word_head.")
    read = {name: parameter for name, parameter in system.named_parameters() if name.startswith(parts)}
    assert all(parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in read.values())


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_other_heads_and_none(original: Any, tmp_path: Path, kind: str) -> None:
    """BertModel's names have no `bert.` before them; BertForMaskedLM has no pooler."""
    model = getattr(transformers, kind)(original.config).eval()
    model.base_model.load_state_dict(original.bert.state_dict(), strict=False)
    names = load_file(saved(model, tmp_path) / "model.safetensors").keys()
    assert any(name.startswith("bert.") for name in names) == (kind != "BertModel")
    system = begun(tmp_path)
    assert_equal_states(original, system)
    parts = bert.begin(system, bert.describe(tmp_path))
    assert ("word_head" in parts) == (kind == "BertForMaskedLM") and ("pooler" in parts) == (kind != "BertForMaskedLM")


@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_model_bin(original: Any, folder: Path, tmp_path: Path, legacy: bool) -> None:
    """As BERT was first published: gamma and beta, a buffer of positions, the table twice."""
    state = original.state_dict()
    if legacy:
        state = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
                 for name, tensor in state.items()}
        state["bert.embeddings.position_ids"] = torch.arange(32)[None]
    shutil.copytree(folder, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert_equal_states(original, begun(tmp_path / "bin"))


def test_the_papers_settings_fit_bert_base() -> None:
    base = {"width": 768, "layers": 12, "heads": 12, "inner": 3072, "norm_epsilon": 1e-12, "post_norm": True}
    assert bert.fitted(paper().model, bert.BERT(Source(Path(), {}, None), 30522, 512, base)) == paper().model


@pytest.mark.parametrize(("changes", "option"), [
    ({"width": 64}, "--model.width 48"), ({"layers": 2}, "--model.layers 3"), ({"heads": 2}, "--model.heads 4"),
    ({"inner": 64}, "--model.inner 96"), ({"post_norm": False}, "--model.post-norm"),
    ({"norm_epsilon": 1e-5}, "--model.norm-epsilon 1e-12"), ({"text_positions": 64}, "--model.text-positions 32"),
])
def test_settings_that_do_not_fit_are_named_with_the_option(
    folder: Path, changes: dict[str, Any], option: str
) -> None:
    with pytest.raises(UserError, match=f"do not fit a model with {next(iter(changes))} .*; give {option}$"):
        begun(folder, **changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "roberta"}, "model_type is 'roberta'"), ({"model_type": None}, "model_type is None"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'"), ({"is_decoder": True}, "is_decoder is True"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ({"hidden_size": None}, "hidden_size is None"), ({"hidden_size": 48.5}, "hidden_size is 48.5"),
    ({"num_hidden_layers": float("nan")}, "num_hidden_layers is nan"),
    ({"layer_norm_eps": float("inf")}, "layer_norm_eps is inf"),
    ({"vocab_size": 99}, "99 tokens, its vocabulary has 23 with"),
    ({"num_hidden_layers": 4}, "holds no encoder.layer.3"), ({"intermediate_size": 64}, "feed_forward.0.weight"),
])
def test_another_config_is_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        begun(tmp_path / "other")


def test_damaged_and_missing_files_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bert")
    with pytest.raises(UserError, match=r"config.json does not exist"):
        bert.describe(tmp_path)
    weights = tmp_path / "bert" / "model.safetensors"
    whole, state = weights.read_bytes(), load_file(weights)
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model.safetensors could not be read as a checkpoint"):
        begun(tmp_path / "bert")
    save_file({**state, "cls.predictions.decoder.weight": torch.zeros(len(LINES), 48)}, weights)
    with pytest.raises(UserError, match="word vectors of its own"):
        begun(tmp_path / "bert")
    weights.unlink()
    with pytest.raises(UserError, match="holds no weights: expected one of model.safetensors"):
        bert.describe(tmp_path / "bert")
    (tmp_path / "bert" / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"pytorch_model.bin.* not a file of torch.save"):
        begun(tmp_path / "bert")
    torch.save({"a": Program(tmp_path / "ran")}, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(UserError, match="it names .* nothing was run") as refused:
        begun(tmp_path / "bert")
    assert "weights_only" not in str(refused.value), "never the advice to run it all the same"
    assert not (tmp_path / "ran").exists()


class Program:
    """Pickled, it is a command to create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_run_begins_with_bert_and_needs_it_no_more(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_shards(tmp_path / "shards", [fake_sample(number) for number in range(32)])
    shutil.copytree(folder, tmp_path / "bert")
    model = dataclasses.replace(bert.fitted(MODEL, bert.describe(folder)), dropout=0.0)
    loop = LoopConfig(steps=2, batch_tokens=300, workers=0, save_every=1)
    config: PretrainConfig = PretrainConfig("opt.paper", (str(tmp_path / "shards"),), tmp_path / "run", model,
                                            start=(f"bert:{tmp_path / 'bert'}",), loop=loop)
    pretrain(config)
    assert "begins with text, regions, encoder, pooler, word_head of bert:" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["start"] == list(config.start) and len(recorded["start_sha256"]) == 64
    trained = from_pretrained(tmp_path / "run" / "model")
    assert trained.tokenizer.fingerprint == Tokenizer.from_bert(folder).fingerprint
    moved = (trained.encoder.blocks[0].feed_forward[0].weight - begun(folder).encoder.blocks[0].feed_forward[0].weight)
    assert 0 < moved.abs().max() < 0.01  # two steps away from BERT's weights, not anywhere else
    shutil.rmtree(tmp_path / "bert")
    pretrain(config)  # goes on without BERT
    with pytest.raises(UserError, match="began with other weights"):
        pretrain(dataclasses.replace(config, start=()))
    fake = dataclasses.replace(config, out=tmp_path / "new")
    with pytest.raises(UserError, match=r"config.json does not exist"):
        pretrain(fake)
    with pytest.raises(UserError, match="expected model:FOLDER.*bert:FOLDER"):
        pretrain(dataclasses.replace(fake, start=("roberta-base",)))
    assert not (tmp_path / "new").exists()


def test_other_words_than_berts_are_refused(folder: Path, tmp_path: Path) -> None:
    fake_shards(tmp_path / "shards", [fake_sample(number) for number in range(32)])
    (tmp_path / "words.txt").write_text("\n".join([*LINES[:-1], "off"]) + "\n")
    config: PretrainConfig = PretrainConfig("opt.paper", (str(tmp_path / "shards"),), tmp_path / "run", MODEL,
                                            start=(f"bert:{folder}",), vocabulary=tmp_path / "words.txt")
    with pytest.raises(UserError, match="holds other words"):
        pretrain(config)
    same = dataclasses.replace(config, vocabulary=folder / "vocab.txt", dry_run=True)
    with pytest.raises(UserError, match="do not fit a model with .*width 768"):
        pretrain(same)
    pretrain(dataclasses.replace(same, model=bert.fitted(MODEL, bert.describe(folder))))
    assert not (tmp_path / "run").exists()
