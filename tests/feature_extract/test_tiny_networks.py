"""The embedded networks: small enough, loadable, and as good on fresh scenes as the project relies on."""

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from feature_extract.sources.spoken_scenes import CLASSES, Scene, draw
from feature_extract.tiny import audio, codes, regions, weights_file

FRESH_SEED, COUNT = 777, 24


@pytest.fixture(scope="module")
def fresh() -> list[Scene]:
    """Scenes of a seed that no network was trained on."""
    return [draw(FRESH_SEED, index) for index in range(COUNT)]


def pixels_of(scene: Scene, side: int) -> torch.Tensor:
    return pil_to_tensor(scene.picture().resize((side, side))).float() / 255


def test_weights_fit_the_package():
    files = sorted(weights_file.FOLDER.glob("*.safetensors"))
    assert [file.stem for file in files] == ["audio", "codes", "regions"]
    assert sum(file.stat().st_size for file in files) <= 12_000_000


def test_weights_travel_in_half_precision_with_their_configuration(tmp_path):
    module = torch.nn.Linear(3, 2)
    weights_file.write(tmp_path / "x.safetensors", module, {"words": ["a"]})
    again = weights_file.read_into(tmp_path / "x.safetensors", torch.nn.Linear(3, 2))
    torch.testing.assert_close(again.weight, module.weight.half().float())
    assert not again.training
    assert weights_file.read_config(tmp_path / "x.safetensors") == {"words": ["a"]}


def test_class_scores_are_the_sum_of_colour_and_shape():
    torch.manual_seed(0)
    predictor = regions.Predictor()
    scores = predictor(torch.randn(5, regions.FEATURES))[0]
    of = {name: scores[:, 1 + place] for place, name in enumerate(CLASSES)}
    torch.testing.assert_close(
        of["red circle"] - of["blue circle"], of["red heart"] - of["blue heart"], atol=1e-5, rtol=1e-5
    )


def test_detector_finds_fresh_objects(fresh: list[Scene]):
    detector = regions.load_regions()
    pictures = [pixels_of(scene, regions.SIDE) for scene in fresh]
    targets = [
        {
            "boxes": torch.tensor([thing.box for thing in scene.objects]) * regions.SIDE,
            "labels": torch.tensor([CLASSES.index(thing.label) + 1 for thing in scene.objects]),
        }
        for scene in fresh
    ]
    figures = regions.measure(detector, pictures, targets)
    assert figures["recall"] > 0.8
    assert figures["precision"] > 0.5


def test_speech_network_hears_the_words(fresh: list[Scene]):
    network, words = audio.load_audio(), audio.load_words()
    references, heard = [], []
    for scene in fresh:
        telling = scene.tellings[0]
        heard.append(audio.read_words(network, audio.standardise(telling.speech().samples), words))
        references.append(telling.caption.text.split())
    assert audio.error_rate(references, heard) < 0.15


def test_speech_network_gives_25_frames_a_second():
    network = audio.load_audio()
    with torch.inference_mode():
        noise = audio.standardise(np.random.default_rng(0).normal(size=32_000))
        frames = network.wav2vec2(torch.from_numpy(noise)[None])
    assert abs(frames.last_hidden_state.shape[1] - 2 * audio.FRAME_RATE) <= 1


def test_image_codes_keep_the_picture(fresh: list[Scene]):
    dvae = codes.load(weights_file.FOLDER / "codes.safetensors")
    pixels = torch.stack([pixels_of(scene, codes.SIDE) for scene in fresh])
    with torch.inference_mode():
        drawn = dvae.encode(pixels)
        error = float((dvae.decode(drawn) - pixels).square().mean())
    assert -10 * np.log10(error) > 23
    assert len(drawn.unique()) > 100
