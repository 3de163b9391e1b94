"""Files of pictures and sound to what the networks read, decoded with limits that a hostile file cannot pass.

    path or URL --read_picture--> RGB picture, upright, on white where it was see-through, and the small JPEG to store
    path or URL --read_recording--> waveform (n,) float32, mono, 16 kHz

A file that cannot be used raises MediaError with the reason: a fixed phrase, details in parentheses after it, no paths,
the same on every run; docs/bad-input.md says what becomes of each kind of file. Beyond the file's own bytes a picture
takes at most 17 bytes a pixel (WebP; others 12) and a recording 10 bytes a sample; both are counted before decoding.
"""

from __future__ import annotations

import io
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from PIL import Image, ImageChops

from feature_extract.fetch import FetchError, Patience, fetch

PATIENCE = Patience(total=60.0, tries=3)
"""With a URL of a corpus: a row that waits longer holds up its worker, and can be retried."""
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
RATES = (4_000, 192_000)
"""Samples a second, least and most: outside of these it is no recording of speech, or a header that lies."""
BLOCK_BYTES = 4_000_000
OPEN_ENDED = 2**31 - 2**16
"""A programme that writes sound into a pipe cannot know its length and puts a number near 2^31 or 2^32 there."""
ORIENTATION = 0x0112
"""The EXIF tag that says how the picture must be turned."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture of each orientation upright (EXIF 2.3, section 4.6.4)."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is checked before decoding
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # damaged EXIF: the picture is read as it lies


class MediaError(Exception):
    """The file is missing, broken, or beyond a limit."""


@dataclass(frozen=True)
class LoadedPicture:
    """A decoded picture (RGB, turned upright) and the JPEG to store of it, None when none is wanted."""

    image: Image.Image
    jpeg: bytes | None


def read_picture(source: Path | str, keep_jpeg: bool = True) -> LoadedPicture:
    """Decode a picture file, or the one at an http(s) URL; of an animated one the first frame. Raises MediaError."""
    content = _content(source)
    try:
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise MediaError(f"picture too large ({opened.width} x {opened.height} pixels)")
            opened.load()
            orientation = _orientation(opened)
            plain = opened.format == "JPEG" and opened.mode in ("RGB", "L") and not opened.info.get("progressive")
            image = _rgb(opened)
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError("picture too large (far too many pixels)") from error
    except Exception as error:  # a decoder may fail in any way on a damaged file
        raise MediaError(_broken("picture", error)) from error
    if not keep_jpeg:
        return LoadedPicture(image, None)
    small = min(image.size) <= STORED_SHORT_SIDE and len(content) <= 3 * image.width * image.height
    return LoadedPicture(image, content if small and orientation == 1 and plain else _encode(image))


def read_recording(source: Path | str, max_seconds: float = 300.0) -> np.ndarray:
    """Decode a sound file, or the one at an http(s) URL, to a waveform (n,) float32, 16 kHz, channels averaged.

    Raises MediaError.
    """
    content = _content(source)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = file.samplerate
            if not RATES[0] <= rate <= RATES[1]:
                raise MediaError(f"recording not usable ({rate:,} samples a second)")
            most = int(max_seconds * rate) + 1
            waveform = np.concatenate([np.zeros(0, np.float32), *_mono_blocks(file, most)])
            whole = len(waveform) == most or not _is_cut(file, len(waveform), content)
        seconds = len(waveform) / rate
        if seconds > max_seconds:
            raise MediaError(f"recording too long (over {max_seconds:g} s)")
        if not whole:
            raise MediaError(f"broken recording (truncated after {seconds:.2f} s)")
        if seconds < SHORTEST_SECONDS:
            raise MediaError(f"recording too short ({seconds:.3f} s)")
        if waveform.min() == waveform.max():
            raise MediaError("silent recording (all samples are alike)")
        return waveform if rate == SAMPLE_RATE else soxr.resample(waveform, rate, SAMPLE_RATE)
    except MediaError:
        raise
    except Exception as error:  # a decoder may fail in any way on a damaged file
        raise MediaError(_broken("recording", error)) from error


def _content(source: Path | str) -> bytes:
    """The file's bytes. Raises MediaError."""
    try:
        content = fetch(source, MAX_FILE_BYTES, PATIENCE) if isinstance(source, str) else _file_content(source)
    except FetchError as error:
        raise MediaError(str(error)) from error
    if not content:
        raise MediaError("empty file")
    return content


def _file_content(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise MediaError("file not readable (not an ordinary file)")
        if status.st_size > MAX_FILE_BYTES:
            raise MediaError(f"file too large (over {MAX_FILE_BYTES:,} bytes)")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MediaError("missing file") from error
    except (OSError, ValueError) as error:
        raise MediaError(f"file not readable ({_short(error)})") from error


def _orientation(opened: Image.Image) -> int:
    """What EXIF says of how the picture lies, 1 (upright) where it says nothing or is damaged itself."""
    try:
        found = opened.getexif().get(ORIENTATION, 1)
    except Exception:  # as a decoder's: in any way
        return 1
    return found if isinstance(found, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel. Raises MediaError for values whose range the file does not say."""
    if image.mode.startswith("I;16"):  # Pillow would cut every value off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise MediaError("picture of 32-bit values (their range is not known; save it with 8 or 16 bits)")
    elif image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes every CMYK JPEG for one of Adobe's, whose inks are inverted
    elif image.has_transparency_data:  # what lies under see-through pixels is arbitrary, black most often
        seen = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", seen.size, "white")
        white.paste(seen, mask=seen)
        return white
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


def _mono_blocks(file: soundfile.SoundFile, most: int) -> Iterator[np.ndarray]:
    """The channels' average in blocks, `most` samples at the most: what the header promises is not believed."""
    block = max(1, BLOCK_BYTES // (4 * file.channels))
    while most > 0:
        samples_nC = file.read(frames=min(block, most), dtype="float32", always_2d=True)
        if not len(samples_nC):
            return
        if not np.abs(samples_nC).max() <= LOUDEST:  # a comparison with NaN is false
            raise MediaError("recording holds NaN, infinity or values beyond 32 bits")
        most -= len(samples_nC)
        yield samples_nC.mean(axis=1)


def _is_cut(file: soundfile.SoundFile, samples: int, content: bytes) -> bool:
    """Whether the file, read to its end, has less than its own headers promise.

    FLAC and MP3 promise a number of samples, WAV and its like a number of bytes (libsndfile reads what there is and
    notes the difference in its log), and the last page of an Ogg stream is marked as the last and lies there whole.
    """
    if file.format == "OGG":
        page = content[content.rfind(b"OggS") :]
        lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
        return not lengths or not page[5] & 4 or len(page) < 27 + len(lengths) + sum(lengths)
    notes = re.findall(r"(?:data|SSND|Data Size|Riff size|riff)\s*: (\d+) \(should be (\d+)\)", file.extra_info)
    return samples < file.frames < OPEN_ENDED or any(int(has) < int(promised) < OPEN_ENDED for promised, has in notes)


def _broken(what: str, error: Exception) -> str:
    """The reason for a decoder's error."""
    if isinstance(error, Image.UnidentifiedImageError) or _short(error) == "Format not recognised":
        return f"broken {what} (of no known format)"
    if "truncated" in str(error).lower():
        return f"broken {what} (truncated)"
    return f"broken {what} ({_short(error)})"


def _short(error: Exception) -> str:
    """One line about the error, the same on every run: no folders, none of the object addresses that decoders name."""
    if isinstance(error, soundfile.LibsndfileError):
        return error.error_string.removeprefix("Error : ").rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {re.sub('<[^<>]* at 0x[0-9a-f]+>', 'it', line)}".removesuffix(": ")
