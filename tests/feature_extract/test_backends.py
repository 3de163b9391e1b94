"""Each backend against the library it stands on, called directly."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model
from torchvision.transforms.functional import pil_to_tensor
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from feature_extract.audio import AudioSettings, pool_frames
from feature_extract.backends import dvae, torchvision_detector, transformers_speech
from feature_extract.extractors import open_extractors, reopen
from feature_extract.regions import RegionSettings
from feature_extract.tiny import weights_file
from opt.config import UserError, to_dict
from opt.nn.dvae import DiscreteVAE, DiscreteVAEConfig

BUILDER = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained detector of five classes whose scores are spread, with its names, as a user would have them."""
    torch.manual_seed(0)
    detector = get_model(BUILDER, weights=None, weights_backbone=None, num_classes=6)
    torch.nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=0.5)
    path = tmp_path_factory.mktemp("detector") / "detector.pt"
    torch.save(detector.state_dict(), path)
    path.with_suffix(".classes.txt").write_text("dog\ncat\ncow\nhen\npig\n")
    return path


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(120, 160, 3), dtype=np.uint8))


@torch.inference_mode()
def test_detections_are_torchvisions_and_features_the_box_heads(checkpoint, picture):
    settings = RegionSettings(max_regions=20, score_threshold=0.05)
    extractor = torchvision_detector.load(f"{BUILDER}:{checkpoint}", settings, "cpu")
    detector = get_model(BUILDER, weights=None, weights_backbone=None, num_classes=6, box_score_thresh=0.05,
                         box_detections_per_img=20).eval()
    detector.load_state_dict(torch.load(checkpoint, weights_only=True))
    seen = {}
    detector.roi_heads.box_head.register_forward_hook(lambda *call: seen.update(features=call[2]))
    detector.roi_heads.box_predictor.register_forward_hook(lambda *call: seen.update(logits=call[2][0]))
    (direct,) = detector([pil_to_tensor(picture).float() / 255])
    found = extractor(picture)
    assert len(found.scores) == 20 and extractor.classes == ("dog", "cat", "cow", "hen", "pig")
    np.testing.assert_array_equal(found.scores, direct["scores"].numpy())
    np.testing.assert_array_equal(found.classes + 1, direct["labels"].numpy())
    np.testing.assert_array_equal(found.boxes, direct["boxes"].numpy() / np.array([160, 120, 160, 120], np.float32))
    probabilities_PC = seen["logits"].softmax(-1)
    for number, (label, score) in enumerate(zip(direct["labels"], direct["scores"], strict=True)):
        origins = torch.where(probabilities_PC[:, label] == score)[0]  # several where proposals coincide
        features = seen["features"][origins].numpy().astype(np.float16)
        assert (found.features[number] == features).all(axis=1).any()


def test_the_best_region_is_kept_when_all_are_below_the_threshold(checkpoint, picture):
    every = torchvision_detector.load(f"{BUILDER}:{checkpoint}", RegionSettings(36, 0.0), "cpu")(picture)
    best = torchvision_detector.load(f"{BUILDER}:{checkpoint}", RegionSettings(36, 0.99), "cpu")(picture)
    assert len(best.scores) == 1
    np.testing.assert_array_equal(best.scores, every.scores[:1])
    np.testing.assert_array_equal(best.features, every.features[:1])


def test_a_picture_of_a_few_lines_is_too_narrow(checkpoint):
    detector = torchvision_detector.load(f"{BUILDER}:{checkpoint}", RegionSettings(), "cpu")
    with pytest.raises(ValueError, match=r"30,000 x 10 pixels is too narrow"):
        detector(Image.new("RGB", (30_000, 10)))
    detector(Image.new("RGB", (20, 600)))


@pytest.mark.parametrize(
    ("weights", "said"),
    [("nothing:x.pt", "BUILDER one of"), (f"{BUILDER}:missing.pt", "could not be read"),
     ("fasterrcnn_resnet50_fpn_v2:{checkpoint}", "does not fit")],
)
def test_a_wrong_checkpoint_is_a_clear_error(checkpoint, weights, said):
    with pytest.raises(UserError, match=said):
        torchvision_detector.load(weights.format(checkpoint=checkpoint), RegionSettings(), "cpu")


def test_transformers_folder_against_a_direct_call(tmp_path):
    torch.manual_seed(0)
    network = Wav2Vec2Model(Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(20, 16), conv_kernel=(20, 16), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2)).eval()
    network.save_pretrained(tmp_path)
    features = Wav2Vec2FeatureExtractor(do_normalize=True)
    features.save_pretrained(tmp_path)
    waveform = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    speech = transformers_speech.load(str(tmp_path), AudioSettings(frames_per_second=25), "cpu")(waveform)
    with torch.inference_mode():
        inputs = features(waveform, sampling_rate=16_000, return_tensors="pt").input_values
        direct_TD = network(inputs).last_hidden_state[0]
    assert direct_TD.shape == (50, 16) and speech.seconds == 1.0 and speech.frame_rate == 25
    np.testing.assert_allclose(speech.features, direct_TD.reshape(25, 2, 16).mean(1).numpy(), atol=2e-3)


def test_a_long_recording_is_averaged_more_coarsely():
    hidden_TD = torch.arange(100.0)[:, None]
    speech = pool_frames(hidden_TD, 16_000 * 4, AudioSettings(frames_per_second=10, max_frames=20))
    assert speech.features.shape == (20, 1) and speech.frame_rate == 5.0 and speech.seconds == 4.0
    np.testing.assert_array_equal(speech.features[:, 0], np.arange(2, 100, 5, dtype=np.float16))
    assert pool_frames(hidden_TD[:1], 1600, AudioSettings(frames_per_second=1)).features.shape == (1, 1)


def test_codes_from_a_file_and_back(tmp_path, picture):
    torch.manual_seed(0)
    network = DiscreteVAE(DiscreteVAEConfig(codebook=32, widths=(8, 8, 8)))
    path = tmp_path / "codes.safetensors"
    weights_file.write(path, network, to_dict(network.config))
    codes = dvae.load(str(path), "cpu")
    found = codes(picture)
    assert found.shape == (8, 8) and found.dtype == np.int16 and 0 <= found.min() <= found.max() < codes.codebook == 32
    pixels = pil_to_tensor(picture.resize((64, 64), Image.Resampling.BICUBIC))[None].float() / 255
    np.testing.assert_array_equal(found, codes.dvae.encode(pixels)[0].numpy())
    assert [decoded.size for decoded in codes.decode(np.stack([found, found]))] == [(64, 64)] * 2


def test_extractors_are_rebuilt_from_their_description(checkpoint, picture):
    first = open_extractors(f"torchvision_detector:{BUILDER}:{checkpoint}", "none", "none", RegionSettings(5, 0.1),
                            AudioSettings(), "cpu")
    about = first.describe()
    again = reopen(about, "cpu")
    np.testing.assert_array_equal(first.regions(picture).features, again.regions(picture).features)
    about["regions"]["weights_sha256"] = "0" * 64
    with pytest.raises(UserError, match="not those that made the shards"):
        reopen(about, "cpu")


def test_an_unknown_backend_names_those_there_are():
    with pytest.raises(UserError, match="there are dalle, dvae, torchaudio_speech, torchvision_detector, tran"):
        open_extractors("detectron9:x", "none", "none", RegionSettings(), AudioSettings(), "cpu")


@pytest.mark.parametrize(
    ("kind", "word"),
    [("regions", "dvae:tiny"), ("regions", "transformers_speech:tiny"), ("audio", "torchvision_detector:tiny"),
     ("audio", "dvae:tiny"), ("codes", "transformers_speech:tiny")],
)
def test_a_backend_of_another_kind_is_refused(kind, word):
    words = {"regions": "none", "audio": "none", "codes": "none"} | {kind: word}
    with pytest.raises(UserError, match=f"--{kind} {word.split(':')[0]}: .* there are"):
        open_extractors(**words, region_settings=RegionSettings(), audio_settings=AudioSettings(), device="cpu")


def test_an_unreadable_checkpoint_gives_no_dangerous_advice(tmp_path):
    path = tmp_path / "detector.pt"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="could not be read as a checkpoint") as error:
        torchvision_detector.load(f"fasterrcnn_resnet50_fpn_v2:{path}", RegionSettings(), "cpu")
    assert "weights_only" not in str(error.value)
