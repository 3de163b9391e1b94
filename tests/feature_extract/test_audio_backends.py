"""Speech backends against the libraries they stand on, and against each other."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from torchaudio.models.wav2vec2.utils import import_huggingface_model
from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining

from feature_extract.audio import AudioSettings, pool_frames
from feature_extract.backends import torchaudio_speech, transformers_speech
from feature_extract.extractors import open_extractors, reopen
from feature_extract.regions import RegionSettings
from opt.config import UserError

OWN_RATE = {"frames_per_second": 0.0, "max_frames": 0}
WAVEFORM = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
FAMILIES = ("wav2vec2", "hubert", "wavlm")


def build(family: str, large: bool = False, kind: Any = AutoModel) -> Any:
    """An untrained network of a family, in the style of its base or large one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_stride=(20, 16), conv_kernel=(20, 16), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, codevector_dim=8, num_codevectors_per_group=12, proj_codevector_dim=8)
    if family != "data2vec-audio":
        config.feat_extract_norm, config.do_stable_layer_norm = ("layer", True) if large else ("group", False)
    network = (kind if kind is Wav2Vec2ForPreTraining else kind.from_config)(config)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


def save(folder: Any, network: Any) -> str:
    """The network as a folder of transformers."""
    network.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return str(folder)


@torch.inference_mode()
def hidden(extractor: Any) -> torch.Tensor:
    """(T, D) in full precision, before it is averaged and stored as float16."""
    return extractor.hear(torch.from_numpy(WAVEFORM)[None])[0]


def block_outputs(network: Any, layers: Any) -> list[torch.Tensor]:
    """What enters the first block, and what leaves each."""
    seen: list[torch.Tensor] = []
    first = layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].clone()))
    rest = [layer.register_forward_hook(lambda _, inputs, out: seen.append(
        (out[0] if isinstance(out, tuple) else out)[0].clone())) for layer in layers]
    with torch.inference_mode():
        network(torch.from_numpy(WAVEFORM)[None])
    for hook in (first, *rest):
        hook.remove()
    return seen


def test_a_folder_against_a_direct_call(tmp_path):
    network = build("wav2vec2")
    speech = transformers_speech.load(save(tmp_path, network), AudioSettings(frames_per_second=25), "cpu")(WAVEFORM)
    inputs = Wav2Vec2FeatureExtractor(do_normalize=True)(WAVEFORM, sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        direct_TD = network(inputs.input_values).last_hidden_state[0]
    assert direct_TD.shape == (50, 16) and speech.seconds == 1.0 and speech.frame_rate == 25 and speech.codes is None
    np.testing.assert_allclose(speech.features, direct_TD.reshape(25, 2, 16).mean(1).numpy(), atol=2e-3)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("family", transformers_speech.MODEL_TYPES)
def test_any_layer_of_any_family(tmp_path, family, large):
    network = build(family, large)
    folder, outputs = save(tmp_path, network), block_outputs(network, network.encoder.layers)
    for layer, expected_TD in enumerate(outputs):
        extractor = transformers_speech.load(folder, AudioSettings(layer=layer), "cpu")
        torch.testing.assert_close(hidden(extractor), expected_TD, atol=1e-6, rtol=0)
        assert len(extractor.network.encoder.layers) == layer
    with torch.inference_mode():
        last_TD = network(torch.from_numpy(WAVEFORM)[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden(transformers_speech.load(folder, AudioSettings(), "cpu")), last_TD)
    for layer in (4, -2):
        with pytest.raises(UserError, match=rf"layer {layer}: it has 0 \(what enters the first block\) to 3, and -1"):
            transformers_speech.load(folder, AudioSettings(layer=layer), "cpu")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_give_the_same_in_torchaudio(family, large):
    """torchaudio's own importer builds its network; both backends agree to 1e-5 at every layer."""
    network = build(family, large)
    imported = import_huggingface_model(copy.deepcopy(network))
    for layer in (-1, 0, 1, 3):
        settings = AudioSettings(**OWN_RATE, layer=layer)
        ours = transformers_speech.TransformersSpeech("", "", copy.deepcopy(network), settings, "cpu")
        theirs = torchaudio_speech.TorchaudioSpeech("", copy.deepcopy(imported), settings, "cpu", normalise=True)
        assert ours.grid == theirs.grid == (320, 320)
        torch.testing.assert_close(hidden(ours), hidden(theirs), atol=1e-5, rtol=0)
        np.testing.assert_allclose(ours(WAVEFORM).features, theirs(WAVEFORM).features, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["HUBERT_LARGE", "WAV2VEC2_ASR_BASE_10M"])
def test_a_bundle_by_its_name(monkeypatch, name):
    """The weights are not fetched: the small network stands in for them, wrapped as torchaudio wraps it."""
    network = import_huggingface_model(build("hubert", large=name == "HUBERT_LARGE"))
    asked = {}

    def get_model(self, *, dl_kwargs):
        asked.update(dl_kwargs)
        wrapped = self._normalize_waveform
        return torchaudio.pipelines._wav2vec2.utils._Wav2Vec2Model(network, True, False, False) if wrapped else network

    bundle = type(getattr(torchaudio.pipelines, name))
    monkeypatch.setattr(bundle, "get_model", get_model)
    extractor = torchaudio_speech.load(name, AudioSettings(**OWN_RATE), "cpu")
    assert asked == {"weights_only": True}
    assert extractor.epsilon == (1e-5 if name == "HUBERT_LARGE" else None)
    heard = torch.from_numpy(WAVEFORM)[None]
    with torch.inference_mode():
        direct_TD = network(torch.nn.functional.layer_norm(heard, heard.shape) if extractor.epsilon else heard)[0][0]
    np.testing.assert_allclose(extractor(WAVEFORM).features, direct_TD.numpy(), rtol=1e-3, atol=1e-4)


def test_codes_are_the_ids_of_the_quantiser(tmp_path):
    network = build("wav2vec2", kind=Wav2Vec2ForPreTraining)
    folder = save(tmp_path, network)
    extractor = transformers_speech.load(folder, AudioSettings(**OWN_RATE, codes=True, layer=1), "cpu")
    speech = extractor(WAVEFORM)
    heard = torch.from_numpy((WAVEFORM - WAVEFORM.mean()) / WAVEFORM.std())[None]
    with torch.inference_mode():
        chosen, _ = network.quantizer(network.wav2vec2(heard).extract_features)
    codevectors_GVD = network.quantizer.codevectors[0].view(2, 12, -1)
    by_id = torch.stack([codevectors_GVD[group][speech.codes[:, group].astype(np.int64)] for group in range(2)], 1)
    torch.testing.assert_close(by_id.flatten(1), chosen[0])
    assert speech.codes.dtype == np.int16 and speech.codes.shape == (50, 2) and extractor.codebooks == (12, 12)
    assert len(np.unique(speech.codes)) > 4
    coarser = transformers_speech.load(folder, AudioSettings(10, codes=True), "cpu")(WAVEFORM)
    np.testing.assert_array_equal(coarser.codes, speech.codes[2::5])


def test_codes_of_hubert_are_the_nearest_centroids_of_the_layer(tmp_path):
    folder, settings = save(tmp_path, build("hubert")), AudioSettings(**OWN_RATE, codes=True, layer=2)
    with pytest.raises(UserError, match=r"no quantiser of its own; put k-means .*\(K, 16\), at .*kmeans\.npy"):
        transformers_speech.load(folder, settings, "cpu")
    np.save(tmp_path / "kmeans.npy", np.zeros((5, 15)))
    with pytest.raises(UserError, match=r"shape \(5, 15\); expected \(K, 16\)"):
        transformers_speech.load(folder, settings, "cpu")
    np.save(tmp_path / "kmeans.npy", np.array([None]), allow_pickle=True)
    with pytest.raises(UserError, match=r"no array of numpy\.save"):
        transformers_speech.load(folder, settings, "cpu")
    plain = transformers_speech.load(folder, AudioSettings(**OWN_RATE, layer=2), "cpu")(WAVEFORM).features
    centroids = plain[[3, 11, 30, 42]].astype(np.float32)
    np.save(tmp_path / "kmeans.npy", centroids)
    extractor = transformers_speech.load(folder, settings, "cpu")
    distances = np.linalg.norm(plain[:, None].astype(np.float32) - centroids, axis=2)
    np.testing.assert_array_equal(extractor(WAVEFORM).codes, distances.argmin(1)[:, None])
    assert extractor.codebooks == (4,)


def test_codes_where_there_is_no_quantiser_are_refused(tmp_path):
    folder = save(tmp_path, build("wav2vec2"))
    with pytest.raises(UserError, match="has no quantiser, so there are no codes"):
        transformers_speech.load(folder, AudioSettings(codes=True), "cpu")
    with pytest.raises(UserError, match="embedded network has no quantiser"):
        transformers_speech.load("tiny", AudioSettings(codes=True), "cpu")
    with pytest.raises(UserError, match="torchaudio's bundles hold no quantiser"):
        torchaudio_speech.load("WAV2VEC2_BASE", AudioSettings(codes=True), "cpu")


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path):
    network = build("wav2vec2")
    state = {name: tensor for name, tensor in network.state_dict().items() if "layers.1.attention" not in name}
    network.save_pretrained(tmp_path, state_dict=state)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks encoder\.layers\.1\.attention\.k_proj\.bias, .* and others; copy"):
        transformers_speech.load(str(tmp_path), AudioSettings(), "cpu")


def test_other_networks_are_refused(tmp_path):
    config = AutoConfig.for_model("bert", hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a bert; expected one of wav2vec2, hubert, wavlm"):
        transformers_speech.load(str(tmp_path), AudioSettings(), "cpu")
    with pytest.raises(UserError, match="no such bundle; it has WAV2VEC2_BASE"):
        torchaudio_speech.load("WAV2VEC3", AudioSettings(), "cpu")


def test_frames_are_averaged_to_the_rate_or_to_the_budget():
    hidden_TD, codes_TG = torch.arange(100.0)[:, None], torch.arange(100)[:, None]
    speech = pool_frames(hidden_TD, codes_TG, 16_000 * 4, 640, AudioSettings(frames_per_second=10, max_frames=20))
    assert speech.features.shape == (20, 1) and speech.frame_rate == 5.0 and speech.seconds == 4.0
    np.testing.assert_array_equal(speech.features[:, 0], np.arange(2, 100, 5, dtype=np.float16))
    np.testing.assert_array_equal(speech.codes[:, 0], np.arange(2, 100, 5))
    assert pool_frames(hidden_TD[:1], None, 1600, 320, AudioSettings(frames_per_second=1)).features.shape == (1, 1)
    unlimited = pool_frames(hidden_TD, None, 16_000 * 4, 640, AudioSettings(frames_per_second=10, max_frames=0))
    assert unlimited.features.shape == (40, 1) and unlimited.frame_rate == 10
    own = pool_frames(hidden_TD, codes_TG, 16_000 * 4 + 300, 640, AudioSettings(frames_per_second=0, max_frames=0))
    assert own.frame_rate == 25 and own.codes.tolist() == codes_TG.tolist()
    np.testing.assert_array_equal(own.features[:, 0], np.arange(100, dtype=np.float16))


def test_the_description_builds_the_same_extractor_again(tmp_path):
    word = f"transformers_speech:{save(tmp_path, build('wav2vec2', kind=Wav2Vec2ForPreTraining))}"
    settings = AudioSettings(layer=2, codes=True, window_seconds=0.5, context_seconds=0.1, frames_per_second=0)
    first = open_extractors("none", word, "none", RegionSettings(), settings, "cpu")
    again = reopen(first.describe(), "cpu")
    assert first.describe() == again.describe() and again.audio.settings == settings
    for mine, theirs in zip((first.audio(WAVEFORM),), (again.audio(WAVEFORM),), strict=True):
        np.testing.assert_array_equal(mine.features, theirs.features)
        np.testing.assert_array_equal(mine.codes, theirs.codes)
