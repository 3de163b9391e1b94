"""Each backend against the library it stands on, called directly."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model

from feature_extract.audio import AudioSettings
from feature_extract.extractors import open_extractors, reopen
from feature_extract.regions import RegionSettings
from feature_extract.tiny import weights_file
from opt.config import UserError

BUILDER = "fasterrcnn_mobilenet_v3_large_320_fpn"


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


def test_extractors_are_rebuilt_from_their_description(checkpoint, picture):
    first = open_extractors(f"torchvision_detector:{BUILDER}:{checkpoint}", "none", "none",
                            RegionSettings(max_regions=5, score_threshold=0.1), AudioSettings(), "cpu")
    about = first.describe()
    again = reopen(about, "cpu")
    np.testing.assert_array_equal(first.regions(picture).features, again.regions(picture).features)
    about["regions"]["weights_sha256"] = "0" * 64
    with pytest.raises(UserError, match="not those that made the shards"):
        reopen(about, "cpu")


def test_an_unknown_backend_names_those_there_are():
    with pytest.raises(UserError, match="there are bottom_up, detectron2_detector, torchvision_detector$"):
        open_extractors("detectron9:x", "none", "none", RegionSettings(), AudioSettings(), "cpu")
    with pytest.raises(UserError, match="there are fairseq_speech, torchaudio_speech, transformers_speech$"):
        open_extractors("none", "dvae:x", "none", RegionSettings(), AudioSettings(), "cpu")


def test_a_relative_path_to_weights_means_the_same_from_anywhere(tmp_path, monkeypatch):
    codes = weights_file.FOLDER / "codes.safetensors"
    monkeypatch.chdir(codes.parent)
    made = open_extractors("none", "none", "dvae:codes.safetensors", RegionSettings(), AudioSettings(), "cpu")
    about = made.describe()
    assert about["codes"]["weights"] == str(codes)
    monkeypatch.chdir(tmp_path)
    assert reopen(about, "cpu").describe() == about


@pytest.mark.parametrize(
    ("kind", "word"),
    [("regions", "dvae:tiny"), ("regions", "transformers_speech:tiny"), ("audio", "torchvision_detector:tiny"),
     ("audio", "dvae:tiny"), ("codes", "transformers_speech:tiny")],
)
def test_a_backend_of_another_kind_is_refused(kind, word):
    words = {"regions": "none", "audio": "none", "codes": "none"} | {kind: word}
    with pytest.raises(UserError, match=f"--{kind} {word.split(':')[0]}: .* there are"):
        open_extractors(**words, region_settings=RegionSettings(), audio_settings=AudioSettings(), device="cpu")
