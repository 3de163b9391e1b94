"""Long recordings: frames where one long call has them, seams that do not show, memory that does not grow."""

import resource

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

from feature_extract.audio import AudioSettings
from feature_extract.backends.transformers_speech import TransformersSpeech, load
from feature_extract.quantisers import ProductQuantiser
from feature_extract.windows import FrameGrid, frame_grid, plan_windows
from opt.config import UserError

RATE = 16_000
SETTINGS = {"frames_per_second": 0, "max_frames": 0}
"""Frames as the network gives them."""


def speech_like(seconds: float) -> np.ndarray:
    """Noise that comes and goes, at 3 syllables a second, and grows louder: a mean over time is not that of a part."""
    time = np.arange(round(seconds * RATE)) / RATE
    loudness = (1.2 + np.sin(2 * np.pi * 3 * time)) * (0.1 + time / seconds)
    return (np.random.default_rng(0).normal(size=len(time)) * loudness).astype(np.float32)


def network(norm: str) -> Wav2Vec2Model:
    """wav2vec 2.0's convolutions, narrow, and two blocks whose attention looks far and matters."""
    torch.manual_seed(0)
    model = Wav2Vec2Model(Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embedding_groups=4, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer",
        conv_bias=norm == "layer"))
    for name, parameter in model.named_parameters():
        if "attention" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def hear(norm: str, waveform: np.ndarray, **settings: float) -> np.ndarray:
    extractor = TransformersSpeech("t", "t", network(norm), AudioSettings(**SETTINGS, **settings), "cpu")
    return extractor(waveform).features.astype(np.float32)


def test_the_grid_is_that_of_the_convolutions():
    assert frame_grid(layer.conv for layer in network("group").feature_extractor.conv_layers) == FrameGrid(320, 400)
    convolutions = nn.Sequential(nn.Conv1d(1, 1, 7, 3), nn.Conv1d(1, 1, 4, 2), nn.Conv1d(1, 1, 5, 5))
    grid = frame_grid(convolutions)
    for samples in range(40, 140):
        frames = convolutions(torch.zeros(1, 1, samples)).shape[-1]
        assert grid.frames(samples) == frames
        piece = grid.samples(1, frames)
        assert frames < 2 or grid.frames(piece.stop - piece.start) == frames - 1 and piece.stop <= samples


@pytest.mark.parametrize(("window", "context"), [(10, 0), (10, 3), (11, 5), (100, 30)])
def test_every_frame_is_kept_once_with_context_on_both_sides(window, context):
    for frames in range(1, 4 * window):
        windows = plan_windows(frames, window, context)
        kept = [frame for one in windows for frame in range(one.first, one.last)]
        assert kept == list(range(frames))
        for one in windows:
            assert one.stop - one.start == min(window, frames) and one.start >= 0 and one.stop <= frames
            assert one.first - one.start >= context or one.first == one.start == 0
            assert one.stop - one.last >= context or one.last == one.stop == frames
        fewest = -(-(frames - 2 * context) // (window - 2 * context)) if frames > window else 1
        assert len(windows) == fewest


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_frames_are_as_many_as_in_one_call_at_every_length_around_the_boundaries(norm):
    extractor = TransformersSpeech(
        "t", "t", network(norm), AudioSettings(**SETTINGS, window_seconds=1, context_seconds=0.3), "cpu")
    whole = TransformersSpeech("t", "t", network(norm), AudioSettings(**SETTINGS, window_seconds=0), "cpu")
    counts = set()
    for around in (RATE, RATE + 8 * 320, RATE + 16 * 320 + 80):
        for samples in (around + off for off in (-321, -320, -1, 0, 1, 79, 80, 81, 319, 320, 321, 400)):
            waveform = speech_like(samples / RATE)
            counts.add(len(plan_windows(extractor.grid.frames(samples), extractor.window, extractor.context)))
            assert len(extractor(waveform).features) == len(whole(waveform).features)
    assert counts == {1, 2}


def test_a_recording_within_a_window_is_one_call():
    waveform = speech_like(5)
    np.testing.assert_array_equal(hear("group", waveform, window_seconds=6, context_seconds=1),
                                  hear("group", waveform, window_seconds=0))


def at_seams(norm: str, context: float) -> tuple[float, float]:
    """How much farther from one long call frames are at seams (the worst) than elsewhere (95 in 100 are below), and how
    much larger steps over a seam are than steps elsewhere. Windows of 10 s that overlap by no more than they must.
    """
    frames, frames_of_context = 499, round(context * 50)
    samples = (frames + 4 * (frames - 2 * frames_of_context) - 1) * 320 + 400
    waveform = speech_like(samples / RATE)
    long_TD = hear(norm, waveform, window_seconds=0)
    ours_TD = hear(norm, waveform, window_seconds=10, context_seconds=context)
    seams = np.array([one.last for one in plan_windows(len(long_TD), frames, frames_of_context)[:-1]])
    assert len(seams) == 4 and len(ours_TD) == len(long_TD)
    near_T = (np.abs(np.arange(len(long_TD))[:, None] - seams) <= 10).any(axis=1)
    away_T, steps_T = np.linalg.norm(ours_TD - long_TD, axis=1), np.linalg.norm(np.diff(ours_TD, axis=0), axis=1)
    return (away_T[near_T].max() / np.quantile(away_T[~near_T], 0.95),
            steps_T[seams - 1].max() / np.quantile(np.delete(steps_T, seams - 1), 0.95))


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_seams_do_not_show(norm):
    """Frames at a seam are no farther from those of one long call than frames elsewhere, and there is no jump."""
    (farther, steeper), (too_little, _) = at_seams(norm, context=2.5), at_seams(norm, context=0.1)
    print(f"{norm} norm: at seams {farther:.2f} of elsewhere, steps {steeper:.2f}; with 0.1 s {too_little:.2f}")
    assert farther < 1.2 and steeper < 1.1
    assert too_little > 1.5  # the measure sees seams where there are some


def test_group_norm_is_that_of_the_whole_recording():
    """Convolved frames of windows are those of one call; with each window's own mean and variance they are not."""
    waveform = speech_like(12) + 2  # an offset: channels have a mean too
    window = {"window_seconds": 3.0, "context_seconds": 0.5}

    def convolved(**settings: float) -> np.ndarray:
        how = AudioSettings(**SETTINGS, **settings)
        extractor = TransformersSpeech("t", "t", network("group"), how, "cpu", epsilon=None)
        extractor.hear = lambda wave: (extractor.network.feature_extractor(wave)[0].T,)
        return extractor(waveform).features.astype(np.float32)

    together, whole = convolved(**window), convolved(window_seconds=0)
    np.testing.assert_allclose(together, whole, atol=2e-3)
    again = TransformersSpeech("t", "t", network("group"), AudioSettings(**SETTINGS), "cpu")
    again(waveform)
    assert again.first_layer.layer_norm.moments is None


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_codes_are_those_of_one_call(norm):
    """The quantiser sees what the convolutions give; rounding may tip a rare balance."""
    torch.manual_seed(1)
    quantiser = ProductQuantiser(nn.Linear(16, 2 * 20), 2)

    def codes(window: float) -> np.ndarray:
        settings = AudioSettings(**SETTINGS, codes=True, window_seconds=window, context_seconds=0.5)
        return TransformersSpeech("t", "t", network(norm), settings, "cpu", quantiser=quantiser)(speech_like(12)).codes

    whole = codes(0)
    assert (codes(3) == whole).mean() > 0.999 and len(np.unique(whole)) > 10


def test_a_recording_is_the_same_alone_and_among_others():
    settings = AudioSettings(window_seconds=3, context_seconds=0.5)
    short, long = speech_like(2), speech_like(9)
    alone = [TransformersSpeech("t", "t", network("group"), settings, "cpu")(one).features for one in (short, long)]
    extractor = TransformersSpeech("t", "t", network("group"), settings, "cpu")
    for one, features in ((short, alone[0]), (long, alone[1]), (short, alone[0]), (long, alone[1])):
        np.testing.assert_array_equal(extractor(one).features, features)


def test_ten_minutes_need_no_more_memory_than_a_window():
    """The recording itself and its features are 40 MB, in several copies; heard whole it takes 650 MB."""
    extractor = load("tiny", AudioSettings(window_seconds=8, context_seconds=1, max_seconds=600), "cpu")
    extractor(speech_like(16))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    speech = extractor(speech_like(600))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert speech.features.shape == (256, 192) and speech.seconds == 600
    assert grown < 400, f"{grown:.0f} MB more"


@pytest.mark.parametrize(
    ("window", "context"), [(10.0, 5.0), (10.0, 0.0), (-1.0, 0.1), (float("inf"), 1.0), (float("nan"), 1.0)])
def test_a_window_must_hold_more_than_its_context(window, context):
    with pytest.raises(UserError, match="longer than twice its context"):
        AudioSettings(window_seconds=window, context_seconds=context)


@pytest.mark.parametrize(("window", "context"), [(0.5, 0.24), (0.02, 0.001)])
def test_a_window_must_hold_more_frames_than_its_context(window, context):
    with pytest.raises(UserError, match=r"window_seconds .* has \d+ frames, .* longer"):
        load("tiny", AudioSettings(window_seconds=window, context_seconds=context), "cpu")
