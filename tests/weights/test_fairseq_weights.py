"""fairseq's checkpoints: read to 1e-5, with and without fairseq to compare with, and never run."""

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

from feature_extract.audio import AudioSettings
from feature_extract.backends import fairseq_speech
from opt.config import UserError
from opt.weights.fairseq import conv_strides, read

CONVOLUTIONS = "[(16, 10, 5)] + [(16, 3, 2)] * 2 + [(16,2,2)]"
SIZES = {
    "encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4,
    "conv_feature_layers": CONVOLUTIONS, "conv_pos": 16, "conv_pos_groups": 4, "activation_fn": "gelu",
}
LARGE = {"extractor_mode": "layer_norm", "conv_bias": True, "layer_norm_first": True}
"""What the large networks (lv60, XLSR, HuBERT large) have otherwise than the base ones."""
WAVEFORM = np.random.default_rng(0).normal(scale=0.1, size=8000).astype(np.float32)
OWN_RATE = {"frames_per_second": 0, "max_frames": 0}


def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Weights drawn so that every one of them, biases and norms too, matters to the output."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        scale = name.endswith("weight") and parameter.ndim == 1  # of a norm
        parameter.data.normal_(mean=float(scale), std=0.2)
    return module.eval()


@torch.inference_mode()
def hear(path: Path, layer: int = -1, waveform: np.ndarray = WAVEFORM) -> torch.Tensor:
    """Ours (T, D), in full precision: before it is stored as float16."""
    extractor = fairseq_speech.load(str(path), AudioSettings(**OWN_RATE, layer=layer), "cpu")
    return extractor.hear(torch.from_numpy(waveform)[None])[0]


# Without fairseq: a transformers network under fairseq's names


def published_name(name: str) -> str:
    """transformers' name of a weight to fairseq's."""
    name = name.removeprefix("wav2vec2.")
    for ours, theirs in (
        ("feature_projection.projection", "post_extract_proj"), ("feature_projection.layer_norm", "layer_norm"),
        ("masked_spec_embed", "mask_emb"), ("encoder.pos_conv_embed.conv", "encoder.pos_conv.0"),
        ("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"),
        ("attention.", "self_attn."), ("feed_forward.intermediate_dense", "fc1"), ("project_hid", "final_proj"),
        ("feed_forward.output_dense", "fc2"), ("codevectors", "vars"),
    ):
        name = name.replace(ours, theirs)
    parts = name.split(".")
    if name.startswith("encoder.layers.") and parts[3] == "layer_norm":
        parts[3] = "self_attn_layer_norm"
    return ".".join(parts)


def with_convolutions_named(state: dict[str, torch.Tensor], layer_norm: bool) -> dict[str, torch.Tensor]:
    place = "2.1" if layer_norm else "2"
    return {name.replace(".conv.", ".0.").replace("layer_norm", place) if "conv_layers" in name else name: value
            for name, value in state.items()}


@pytest.fixture(scope="module", params=["base", "large"])
def network(request) -> Wav2Vec2ForPreTraining:
    large = request.param == "large"
    return spread(Wav2Vec2ForPreTraining(Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(16,) * 4,
        conv_kernel=(10, 3, 3, 2), conv_stride=(5, 2, 2, 2), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, num_codevectors_per_group=20, codevector_dim=24, proj_codevector_dim=24,
        conv_bias=large, feat_extract_norm="layer" if large else "group", do_stable_layer_norm=large)))


def saved(network: Wav2Vec2ForPreTraining, **changed: Any) -> dict[str, Any]:
    """What fairseq's trainer would have saved of it."""
    large = network.config.do_stable_layer_norm
    state = {published_name(name): value for name, value in network.state_dict().items()}
    model = {"_name": "wav2vec2", **SIZES, **(LARGE if large else {"layer_norm_first": False}), "latent_groups": 2}
    return {"args": None, "cfg": {"model": model, "task": {"_name": "audio_pretraining", "normalize": large}},
            "model": with_convolutions_named(state, large), "extra_state": {}, **changed}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_network_under_fairseqs_names_is_the_same_network(network, tmp_path, zipped):
    path = tmp_path / "network.pt"
    torch.save(saved(network), path, _use_new_zipfile_serialization=zipped)
    loaded = fairseq_speech.load(str(path), AudioSettings(**OWN_RATE, codes=True), "cpu")
    ours, theirs = loaded.network.state_dict(), network.wav2vec2.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    speech = loaded(WAVEFORM)
    large = network.config.do_stable_layer_norm
    assert loaded.epsilon == (1e-5 if large else None) and speech.frame_rate == 400
    heard = torch.from_numpy(WAVEFORM)[None]
    with torch.inference_mode():
        direct = network.wav2vec2(torch.nn.functional.layer_norm(heard, heard.shape) if large else heard)
        scores_TGV = network.quantizer.weight_proj(direct.extract_features[0]).view(-1, 2, 20)
    np.testing.assert_allclose(speech.features, direct.last_hidden_state[0].numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(speech.codes, scores_TGV.argmax(-1).numpy())
    assert loaded.codebooks == (20, 20)


def test_settings_of_older_checkpoints_lie_in_a_namespace(network, tmp_path):
    newer, path = saved(network), tmp_path / "older.pt"
    flat = Namespace(arch="wav2vec2", **{**newer["cfg"]["task"], **newer["cfg"]["model"]})
    torch.save({**newer, "cfg": None, "args": flat}, path)
    torch.save(newer, tmp_path / "newer.pt")
    assert read(path).settings == read(tmp_path / "newer.pt").settings


def test_a_fine_tuned_checkpoint_gives_the_network_inside(network, tmp_path):
    whole, path = saved(network), tmp_path / "tuned.pt"
    inside = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in whole["model"].items()
              if not name.startswith(("quantizer", "project_q", "final_proj"))}
    model = {"_name": "wav2vec_ctc", "normalize": False, "w2v_args": Namespace(**whole["cfg"])}
    torch.save({**whole, "model": {**inside, "w2v_encoder.proj.weight": torch.zeros(5, 32)},
                "cfg": {"model": model, "task": {"normalize": False}}}, path)
    with torch.inference_mode():
        torch.testing.assert_close(
            hear(path), network.wav2vec2(torch.from_numpy(WAVEFORM)[None]).last_hidden_state[0], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"no quantiser of its own; put k-means .* at .*tuned\.kmeans\.npy"):
        fairseq_speech.load(str(path), AudioSettings(codes=True), "cpu")


class Evil:
    """Unpickled, it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_a_program_in_it_is_refused_and_runs_nothing(network, tmp_path, zipped):
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save(saved(network, task_state=Evil(mark)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"names posix\.system, which has no place"):
        read(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": None}, "it has no 'model'"),
        ({"cfg": None}, "lack conv_feature_layers"),
        ({"model": {"encoder.layers.0.conv_module.x": torch.zeros(1)}}, r"conv_module\.x is part of neither"),
        ({"model": {}}, r"lacks encoder\.pos_conv"),
    ],
)
def test_other_files_are_a_sentence(network, tmp_path, changed, said):
    path = tmp_path / "other.pt"
    torch.save(saved(network, **changed), path)
    with pytest.raises(UserError, match=said):
        read(path)


def test_weights_that_do_not_fit_are_a_sentence(network, tmp_path):
    whole, path = saved(network), tmp_path / "other.pt"
    whole["model"]["encoder.layers.1.fc1.weight"] = torch.zeros(3, 3)
    torch.save(whole, path)
    with pytest.raises(UserError, match=r"do not fit together .*layers\.1\.feed_forward"):
        fairseq_speech.load(str(path), AudioSettings(), "cpu")
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "missing.pt")


def test_strides_are_read_from_the_expression_and_nothing_else_is():
    wav2vec2 = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
    assert conv_strides(Path("x"), wav2vec2) == [5, 2, 2, 2, 2, 2, 2]
    assert conv_strides(Path("x"), "[(8, 10, 5), (8, 3, 2)]*2") == [5, 2, 5, 2]
    for other in ("__import__('os').system('true')", "[(1, 2)]", "[(8, 3, 2)] * 99999999", "", None):
        with pytest.raises(UserError, match="conv_feature_layers is"):
            conv_strides(Path("x"), other)


# With fairseq: its own networks


def save_fairseqs(kind: str, path: Path, sizes: dict[str, Any]) -> torch.nn.Module:
    """A network of fairseq's, saved with its own function; settings as its trainer writes them, or as omegaconf's."""
    pytest.importorskip("fairseq")
    from fairseq.checkpoint_utils import torch_persistent_save
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config as Config
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Model
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
    from omegaconf import OmegaConf

    family, _, style = kind.partition(" ")
    shape = {**sizes, **(LARGE if style == "large" else {})}
    torch.manual_seed(0)
    if family == "hubert":
        settings: Any = HubertConfig(label_rate=50, **shape)
        module = HubertModel(settings, HubertPretrainingConfig(data="x", labels=["km"]), [list(range(20))])
    else:
        settings = Config(quantize_targets=True, latent_vars=20, **shape)
        module = Wav2Vec2Model(settings)
    cfg: Any = {"model": OmegaConf.to_container(OmegaConf.structured(settings), enum_to_str=True),
                "task": {"normalize": style == "large"}}
    cfg = OmegaConf.create(cfg) if style == "large" else cfg
    torch_persistent_save({"args": None, "cfg": cfg, "model": module.state_dict()}, str(path))
    return module.eval()


@pytest.fixture(scope="module", params=["wav2vec2 base", "wav2vec2 large", "hubert base", "hubert large"])
def fairseqs(request, tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A small network of fairseq's whose weights all matter, and its file."""
    path = tmp_path_factory.mktemp("fairseq") / "network.pt"
    module = spread(save_fairseqs(request.param, path, {**SIZES, "final_dim": 24}))
    torch.save({**torch.load(path, weights_only=False), "model": module.state_dict()}, path)
    return module, path


@torch.inference_mode()
def test_fairseqs_own_networks_give_the_same_at_every_layer(fairseqs):
    module, path = fairseqs
    heard = torch.from_numpy(WAVEFORM)[None]
    for layer in (1, 2, -1):  # HuBERT counts layers from 1, wav2vec 2.0 from 0
        number = layer if hasattr(module, "label_embs_concat") else layer - 1
        out = module.extract_features(heard, padding_mask=None, mask=False,
                                      **({} if layer == -1 else {"output_layer": number} if number == layer
                                         else {"layer": number}))
        theirs_TD = (out[0] if isinstance(out, tuple) else out["x"])[0]
        difference = (hear(path, layer) - theirs_TD).abs().max().item()
        print(f"{type(module).__name__} layer {layer}: {difference:.1e} of {theirs_TD.abs().max():.1f}")
        assert difference < 1e-5


@torch.inference_mode()
def test_torchaudios_importer_gives_the_same(fairseqs):
    from torchaudio.models.wav2vec2.utils import import_fairseq_model

    module, path = fairseqs
    theirs_TD = import_fairseq_model(module).eval()(torch.from_numpy(WAVEFORM)[None])[0][0]
    difference = (hear(path) - theirs_TD).abs().max().item()
    print(f"torchaudio's import of {type(module).__name__}: {difference:.1e}")
    assert difference < 1e-5


@torch.inference_mode()
def test_ids_are_those_of_fairseqs_quantiser(fairseqs):
    module, path = fairseqs
    if not hasattr(module, "quantize"):
        pytest.skip("HuBERT has no quantiser")
    settings = AudioSettings(**OWN_RATE, codes=True)
    extractor = fairseq_speech.load(str(path), settings, "cpu")
    _, codes_TG = extractor.hear(torch.from_numpy(WAVEFORM)[None])
    _, theirs_1TG = module.quantize(torch.from_numpy(WAVEFORM)[None])
    assert torch.equal(codes_TG, theirs_1TG[0]) and len(codes_TG.unique()) > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wav2vec2 base", "wav2vec2 large", "hubert base"])
@torch.inference_mode()
def test_networks_of_the_published_sizes(kind, tmp_path):
    large = {"encoder_layers": 24, "encoder_embed_dim": 1024, "encoder_ffn_embed_dim": 4096,
             "encoder_attention_heads": 16}
    module = save_fairseqs(kind, tmp_path / "network.pt", large if kind.endswith("large") else {})
    waveform = np.random.default_rng(0).normal(size=32_000).astype(np.float32)
    out = module.extract_features(torch.from_numpy(waveform)[None], padding_mask=None, mask=False)
    theirs_TD = (out[0] if isinstance(out, tuple) else out["x"])[0]
    difference = (hear(tmp_path / "network.pt", waveform=waveform) - theirs_TD).abs().max()
    print(f"{kind}, {sum(one.numel() for one in module.parameters()):,} parameters: {difference:.1e}")
    assert difference < 1e-5
