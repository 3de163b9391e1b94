"""Files of pictures and sound to what the networks read, decoded with limits that a hostile file cannot pass.

    path --read_picture--> RGB picture, upright, and the small JPEG to store
    path --read_recording--> waveform (n,) float32, mono, 16 kHz

A file that cannot be used raises MediaError with the reason: a fixed phrase, details in parentheses after it.
"""

from __future__ import annotations

import io
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from PIL import Image, ImageOps

SAMPLE_RATE = 16_000
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened. Not every format Pillow knows: some run other programs (EPS)."""
MAX_PIXELS = 80_000_000
MAX_FILE_BYTES = 200_000_000
STORED_SHORT_SIDE = 256
STORED_QUALITY = 90
LOUDEST = 2.0**32
"""Beyond full scale of 32-bit integers a value is damage; its square would soon overflow float32."""
SHORTEST_SECONDS = 0.1
"""Below this a speech network has not one whole frame."""
ORIENTATION = 0x0112
"""The EXIF tag that says how the picture must be turned."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is checked before decoding


class MediaError(Exception):
    """The file is missing, broken, or beyond a limit."""


@dataclass(frozen=True)
class LoadedPicture:
    """A decoded picture (RGB, turned upright) and the JPEG to store of it, None when none is wanted."""

    image: Image.Image
    jpeg: bytes | None


def read_picture(path: Path, keep_jpeg: bool = True) -> LoadedPicture:
    """Decode a picture file. Raises MediaError."""
    content = _content(path)
    try:
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise MediaError(f"picture too large ({opened.width} x {opened.height} pixels)")
            opened.load()
            upright = opened.getexif().get(ORIENTATION, 1) == 1
            plain = opened.format == "JPEG" and opened.mode in ("RGB", "L") and not opened.info.get("progressive")
            image = _rgb(opened if upright else ImageOps.exif_transpose(opened))
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"picture too large ({error})") from error
    except Exception as error:  # a decoder may fail in any way on a damaged file
        raise MediaError(f"broken picture ({_short(error)})") from error
    if not keep_jpeg:
        return LoadedPicture(image, None)
    small = min(image.size) <= STORED_SHORT_SIDE and len(content) <= 3 * image.width * image.height
    return LoadedPicture(image, content if small and upright and plain else _encode(image))


def read_recording(path: Path, max_seconds: float = 300.0) -> np.ndarray:
    """Decode a sound file to a waveform (n,) float32 at 16 kHz, channels averaged. Raises MediaError."""
    content = _content(path)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = file.samplerate
            waveform_nC = file.read(frames=int(max_seconds * rate) + 1, dtype="float32", always_2d=True)
        seconds = len(waveform_nC) / rate
        if seconds > max_seconds:
            raise MediaError(f"recording too long (over {max_seconds:g} s)")
        if seconds < SHORTEST_SECONDS:
            raise MediaError(f"recording too short ({seconds:.3f} s)")
        if not np.abs(waveform_nC).max() <= LOUDEST:  # a comparison with NaN is false
            raise MediaError("recording holds NaN, infinity or values beyond 32 bits")
        waveform = waveform_nC.mean(axis=1)
        return waveform if rate == SAMPLE_RATE else soxr.resample(waveform, rate, SAMPLE_RATE)
    except MediaError:
        raise
    except Exception as error:  # a decoder may fail in any way on a damaged file
        raise MediaError(f"broken recording ({_short(error)})") from error


def _content(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise MediaError("file not readable (not an ordinary file)")
        if status.st_size > MAX_FILE_BYTES:
            raise MediaError(f"file too large ({status.st_size:,} bytes)")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MediaError("missing file") from error
    except (OSError, ValueError) as error:
        raise MediaError(f"file not readable ({_short(error)})") from error


def _rgb(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel. Raises MediaError for values whose range the file does not say."""
    if image.mode.startswith("I;16"):  # Pillow would cut every value off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise MediaError("picture of 32-bit values (their range is not known; save it with 8 or 16 bits)")
    return image.convert("RGB")


def _encode(image: Image.Image) -> bytes:
    """The picture, its short side at most STORED_SHORT_SIDE, as a JPEG that depends on nothing but its pixels."""
    scale = STORED_SHORT_SIDE / min(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=STORED_QUALITY)
    return buffer.getvalue()


def _short(error: Exception) -> str:
    """One line about the error, the same on every run: no folders, none of the object addresses that decoders name."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {re.sub('<[^<>]* at 0x[0-9a-f]+>', 'it', line)}".removesuffix(": ")
