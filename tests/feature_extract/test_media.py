"""Files nobody should have to expect: each becomes a picture or a waveform that is right, or a MediaError."""

import io
import os

import numpy as np
import pytest
import soundfile
from PIL import Image

from feature_extract.media import MediaError, read_picture, read_recording

GREY = np.linspace(0, 255, 64 * 64).astype(np.uint8).reshape(64, 64)
NOISE = np.random.default_rng(0).normal(scale=0.1, size=16_000).astype(np.float32)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int = 16_000, subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_not_burnt_out(tmp_path, kind):
    path = tmp_path / "deep"
    path.write_bytes(encoded(Image.fromarray(GREY.astype(np.uint16) * 257), kind))
    np.testing.assert_array_equal(np.asarray(read_picture(path).image)[..., 0], GREY)


def test_values_without_a_known_range_are_refused(tmp_path):
    path = tmp_path / "float.tif"
    path.write_bytes(encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"))
    with pytest.raises(MediaError, match="32-bit"):
        read_picture(path)


def test_what_follows_a_jpeg_is_not_stored(tmp_path):
    path, plain = tmp_path / "a.jpg", encoded(Image.fromarray(GREY), "JPEG")
    path.write_bytes(plain)
    assert read_picture(path).jpeg == plain
    path.write_bytes(plain + bytes(1_000_000))
    assert len(read_picture(path).jpeg) < 10_000


def test_only_ordinary_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "endless", "folder", "loop"):
        for read in (read_picture, read_recording):
            with pytest.raises(MediaError, match="^file not readable") as error:
                read(tmp_path / name)
            assert str(tmp_path) not in str(error.value)


def test_reasons_are_the_same_on_every_run(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"not sound at all")
    for read, what in ((read_picture, "picture"), (read_recording, "recording")):
        with pytest.raises(MediaError) as error:
            read(path)
        assert str(error.value) == f"broken {what} (of no known format)"


@pytest.mark.parametrize("loud", [1e20, 1e37])
def test_values_no_recording_has_are_refused(tmp_path, loud):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(NOISE * np.float32(loud)))
    with pytest.raises(MediaError, match="NaN, infinity or values beyond"):
        read_recording(path)


def test_stereo_8_khz_and_32_bit_integers_are_recordings(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(np.stack([NOISE, NOISE], axis=1)))
    np.testing.assert_allclose(read_recording(path), NOISE)
    path.write_bytes(wav(NOISE[:8000], 8000))
    assert len(read_recording(path)) == 16_000
    path.write_bytes(wav(NOISE.astype(np.float64), subtype="PCM_32"))
    np.testing.assert_allclose(read_recording(path), NOISE, atol=1e-6)
