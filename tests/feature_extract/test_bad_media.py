"""docs/bad-input.md row by row: each kind of file is made, read, and becomes what the page says."""

import io
import os
import re
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import bucket
import numpy as np
import pytest
import soundfile
from PIL import Image, ImageFile, ImageOps

from feature_extract.media import MAX_FILE_BYTES, MediaError, read_picture, read_recording

PAGE = (Path(__file__).parents[2] / "docs" / "bad-input.md").read_text()


def rows(section: str) -> dict[str, str]:
    """What comes in -> the reason, "" where it is used."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert all(happens.startswith("refused" if reason else "used") for _, happens, reason in table[2:])
    return {kind: reason.strip("`") for kind, _, reason in table[2:]}


def agrees(reason: str, on_the_page: str) -> bool:
    """Equal, `...` standing for a decoder's own words."""
    return re.fullmatch(re.escape(on_the_page).replace(re.escape("..."), ".+"), reason) is not None


# Pictures. BASE has another colour in each corner, so that whatever is turned or cut shows.

Y, X = np.mgrid[0:64, 0:96]
BASE = np.stack([X * 2, Y * 3, 255 - X - Y], axis=-1).astype(np.uint8)
RGB = Image.fromarray(BASE)
GREY = np.asarray(RGB.convert("L"))
HOLE = (X < 48).astype(np.uint8) * 255
ON_WHITE = np.where(HOLE[..., None] > 0, BASE, 255)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def png(width: int, height: int, depth: int, color: int, body: bytes, *more: bytes) -> bytes:
    """A PNG by hand: what Pillow cannot write, or should not have to."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0), *more]
    chunks += [b"IDAT" + zlib.compress(body, 1), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def interlaced() -> bytes:
    """BASE in the seven passes of Adam7 (PNG specification, section 8.2)."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    body = b"".join(
        b"\0" + row.tobytes() for top, left, down, across in passes for row in BASE[top::down, left::across]
    )
    content = png(96, 64, 8, 2, body)
    header = content[12:28] + b"\1"  # IHDR up to its last byte, which says Adam7
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def cmyk(adobe: bool) -> bytes:
    inks = RGB.convert("CMYK")
    if adobe:
        return saved(inks, "JPEG", quality=95)
    content = saved(Image.fromarray(255 - np.asarray(inks), "CMYK"), "JPEG", quality=95)
    marker = content.index(b"\xff\xee")
    return content[:marker] + content[marker + 2 + int.from_bytes(content[marker + 2 : marker + 4], "big") :]


def turned(orientation: int) -> bytes:
    """BASE, laid down so that the orientation sets it upright again: by Pillow's own understanding of it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for backwards in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                      Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE,
                      Image.Transpose.ROTATE_270, None):
        laid = RGB if backwards is None else RGB.transpose(backwards)
        content = saved(laid, "JPEG", quality=95, exif=exif)
        if ImageOps.exif_transpose(Image.open(io.BytesIO(content))).size == RGB.size and near(
            np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))), BASE
        ):
            return content
    raise AssertionError(orientation)


def near(image: np.ndarray, expected: np.ndarray, most: float = 3.0) -> bool:
    return image.shape == expected.shape and np.abs(image.astype(float) - expected).mean() < most


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.fromarray(HOLE))
    return image


def palette() -> bytes:
    pixels = Image.fromarray((X // 48).astype(np.uint8), "P")
    pixels.putpalette([10, 20, 30, 40, 50, 60])
    return saved(pixels, "PNG", transparency=1)


OTHER = Image.fromarray(255 - BASE)
JPEG = saved(RGB, "JPEG", quality=95)
IN_GREY = np.repeat(GREY[..., None], 3, axis=2)
PICTURES: dict[str, tuple[bytes | list[bytes], np.ndarray | None]] = {
    "a plain small JPEG": (JPEG, BASE),
    "a truncated JPEG": ([half(JPEG), JPEG[: int(0.98 * len(JPEG))]], None),
    "a truncated progressive JPEG": (half(saved(RGB, "JPEG", progressive=True)), None),
    "a truncated PNG": ([half(saved(RGB, "PNG")), saved(RGB, "PNG")[:-30]], None),
    "a truncated GIF": (half(saved(RGB, "GIF")), None),
    "a truncated WebP": (half(saved(RGB, "WEBP")), None),
    "a PNG with a wrong byte": (flipped(saved(RGB, "PNG")), None),
    "a JPEG that ends too early with an end marker": (JPEG[: int(0.9 * len(JPEG))] + b"\xff\xd9", None),
    "a file of zero bytes": (b"", None),
    "a PNG of 30,000 x 30,000 pixels in 100 kB (bomb)": (png(30_000, 30_000, 1, 0, bytes(3751 * 30_000)), None),
    "a PNG of 10,000 x 10,000 pixels": (png(10_000, 10_000, 1, 0, bytes(1251 * 10_000)), None),
    "a PNG whose text unpacks to 100 MB (bomb)": (
        png(1, 1, 8, 0, b"\0\0", b"zTXta\0\0" + zlib.compress(bytes(100_000_000), 1)), None),
    "a picture 20,000 pixels wide": (saved(Image.new("RGB", (20_000, 40), "red"), "PNG"),
                                     np.full((40, 20_000, 3), (255, 0, 0))),
    "a picture of 1 x 1 pixel": (saved(Image.new("RGB", (1, 1), "red"), "PNG"), np.full((1, 1, 3), (255, 0, 0))),
    "a JPEG in CMYK, as Adobe writes it": (cmyk(adobe=True), BASE),
    "a JPEG in CMYK, inks not inverted": (cmyk(adobe=False), BASE),
    "a grey PNG of 16 bits": (saved(Image.fromarray(GREY.astype(np.uint16) * 256 + 255), "PNG"), IN_GREY),
    "a colour PNG of 16 bits": (
        png(96, 64, 16, 2, b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in BASE)), BASE),
    "a TIFF of 32-bit numbers": ([saved(Image.fromarray(GREY.astype(kind)), "TIFF") for kind in ("f4", "i4")], None),
    "a black and white picture (1 bit)": (saved(Image.fromarray(HOLE > 0), "PNG"), np.repeat(HOLE[..., None], 3, 2)),
    "an animated GIF": (saved(RGB, "GIF", save_all=True, append_images=[OTHER] * 500), BASE),
    "an animated WebP": (saved(RGB, "WEBP", save_all=True, append_images=[OTHER] * 5, lossless=True), BASE),
    "an animated PNG": (saved(RGB, "PNG", save_all=True, append_images=[OTHER] * 5), BASE),
    "a JPEG turned by EXIF, each of the 8 ways": ([turned(orientation) for orientation in range(1, 9)], BASE),
    "a JPEG with damaged EXIF": (saved(RGB, "JPEG", quality=95, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"), BASE),
    "a picture with alpha": ([saved(with_alpha(RGB.copy()), kind) for kind in ("PNG", "TIFF")], ON_WHITE),
    "a grey picture with alpha": (saved(with_alpha(Image.fromarray(GREY)), "PNG"),
                                  np.where(HOLE[..., None] > 0, IN_GREY, 255)),
    "a palette with transparency": (palette(), np.where(X[..., None] < 48, (10, 20, 30), 255)),
    "an interlaced PNG": (interlaced(), BASE),
    "a progressive JPEG": (saved(RGB, "JPEG", progressive=True, quality=95), BASE),
    "a JPEG with a megabyte after its end": (JPEG + bytes(1_000_000), BASE),
    "a PNG called .jpg": (saved(RGB, "PNG"), BASE),
    "an HTML page called .jpg": (b"<!DOCTYPE html><html><title>404</title></html>", None),
    "an SVG, EPS, AVIF or JPEG 2000 picture": (
        [b'<svg xmlns="http://www.w3.org/2000/svg"/>', *(saved(RGB, kind) for kind in ("EPS", "AVIF", "JPEG2000"))],
        None),
}
STORED_AS_THEY_ARE = ("a plain small JPEG", "a JPEG with damaged EXIF", "a JPEG that ends too early with an end marker")


def test_every_row_has_its_file():
    assert set(rows("Pictures")) == set(PICTURES)
    assert set(rows("Recordings")) == set(RECORDINGS)
    assert set(rows("Either")) == {*FILES, *ADDRESSES}
    assert len(PICTURES) + len(RECORDINGS) + len(FILES) + len(ADDRESSES) > 60


@pytest.mark.parametrize("kind", PICTURES)
def test_picture(kind, tmp_path):
    contents, expected = PICTURES[kind]
    for content in contents if isinstance(contents, list) else [contents]:
        path = tmp_path / "picture.jpg"
        path.write_bytes(content)
        if reason := rows("Pictures")[kind]:
            assert agrees(refused(read_picture, path), reason)
            continue
        loaded = read_picture(path)
        assert loaded.image.mode == "RGB"
        assert expected is None or near(np.asarray(loaded.image), expected)
        if kind in STORED_AS_THEY_ARE or kind.startswith("a JPEG turned") and content == PICTURES[kind][0][0]:
            assert loaded.jpeg == content
        else:
            with Image.open(io.BytesIO(loaded.jpeg)) as stored:
                assert stored.format == "JPEG" and stored.mode == "RGB" and len(loaded.jpeg) < 500_000
                assert not stored.info.get("progressive") and 0x0112 not in stored.getexif()
                assert stored.size == loaded.image.size


def test_pillow_is_not_told_to_accept_truncated_files():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# Recordings. SOUND is two seconds of noise whose loudness grows.

RATE = 16_000
SOUND = (np.random.default_rng(0).normal(size=2 * RATE) * np.linspace(0.01, 0.2, 2 * RATE)).astype(np.float32)


def sound(samples: np.ndarray = SOUND, kind: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def data_bytes(content: bytes, count: int) -> bytes:
    """A WAV that says it has so many bytes of samples."""
    place = content.index(b"data") + 4
    size = struct.pack("<I", count)
    return content[:4] + size + content[8:place] + size + content[place + 4 :]


def unknown_length(content: bytes) -> bytes:
    """A FLAC whose number of samples (the low 36 bits from byte 18 on) is 0: not known."""
    number = int.from_bytes(content[18:26], "big") >> 36 << 36
    return content[:18] + number.to_bytes(8, "big") + content[26:]


def at_rate(content: bytes, rate: int) -> bytes:
    return content[:24] + struct.pack("<I", rate) + content[28:]


WAV = sound(subtype="PCM_16")
FLAC = sound(kind="FLAC")
SIX = np.stack([SOUND * gain for gain in (0.5, 1.0, 1.5, 0.0, 2.0, 1.0)], axis=1)
MP4 = b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0" + bytes(1000)
RECORDINGS: dict[str, tuple[bytes, np.ndarray | int | None]] = {
    "a plain WAV": (WAV, SOUND),
    "a truncated WAV": (WAV[: len(WAV) - 2 * RATE], None),
    "a truncated AIFF": (sound(kind="AIFF")[: -2 * RATE], None),
    "a truncated MP3": (half(sound(kind="MP3")), None),
    "a truncated Ogg": (half(sound(kind="OGG")), None),
    "a truncated FLAC": (half(FLAC), None),
    "a FLAC with a wrong byte": (flipped(FLAC), None),
    "a WAV written into a pipe, its length not known": (data_bytes(WAV, 2**32 - 1), SOUND),
    "a FLAC written into a pipe, its length not known": (unknown_length(FLAC), None),
    "a recording of zero bytes": (b"", None),
    "a WAV without samples": (sound(SOUND[:0]), None),
    "a recording of 50 ms": (sound(SOUND[:800]), None),
    "a recording with NaN": (sound(np.where(np.arange(2 * RATE) == 9999, np.nan, SOUND), subtype="FLOAT"), None),
    "a recording with infinity": (sound(np.where(np.arange(2 * RATE) == 9999, np.inf, SOUND), subtype="FLOAT"), None),
    "a recording of all zeros": (sound(np.zeros(2 * RATE)), None),
    "two channels that cancel each other": (sound(np.stack([SOUND, -SOUND], 1), subtype="FLOAT"), None),
    "a recording that clips": (sound(np.clip(SOUND * 20, -1, 1), subtype="FLOAT"), np.clip(SOUND * 20, -1, 1)),
    "a WAV of 8 bits": (sound(subtype="PCM_U8"), SOUND),
    "a WAV of 24 bits": (sound(subtype="PCM_24"), SOUND),
    "a stereo recording": (sound(np.stack([SOUND * 0.5, SOUND * 1.5], 1)), SOUND),
    "a recording of six channels (5.1)": (sound(SIX, subtype="FLOAT"), SOUND),
    "a recording with 8,000 samples a second": (sound(SOUND[::2], rate=8000), 2 * RATE),
    "a recording with 96,000 samples a second": (sound(SOUND, rate=96_000), RATE // 3),
    "a header with 768,000 samples a second": (at_rate(WAV, 768_000), None),
    "ten minutes": (sound(np.tile(SOUND, 300)), None),
    "an Ogg called .wav": (sound(kind="OGG"), 2 * RATE),
    "a text called .wav": (b"This is not a recording. " * 40, None),
    "an MP4 called .wav": (MP4, None),
}


@pytest.mark.parametrize("kind", RECORDINGS)
def test_recording(kind, tmp_path):
    content, expected = RECORDINGS[kind]
    path = tmp_path / "recording.wav"
    path.write_bytes(content)
    if reason := rows("Recordings")[kind]:
        assert agrees(refused(read_recording, path), reason)
        return
    waveform = read_recording(path)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    if isinstance(expected, np.ndarray):
        np.testing.assert_allclose(waveform, expected, atol=0.008 if "8 bits" in kind else 1e-4)
    else:
        assert abs(len(waveform) - expected) <= 1


@pytest.mark.parametrize("kind", ["RF64", "W64", "AU", "WAVEX"])
def test_other_headers_promise_too(kind, tmp_path):
    path = tmp_path / "recording"
    path.write_bytes(sound(kind=kind, subtype="PCM_16")[: -2 * RATE])
    assert refused(read_recording, path) == "broken recording (truncated after 1.00 s)"


@pytest.mark.parametrize("end", [1, 20, 27, 40])
def test_an_ogg_is_cut_wherever_its_last_page_is(end, tmp_path):
    content = sound(kind="OGG")
    path = tmp_path / "recording"
    path.write_bytes(content + b"a tag that some programs add")
    assert len(read_recording(path)) == 2 * RATE
    path.write_bytes(content[: content.rindex(b"OggS") + end])
    assert refused(read_recording, path).startswith("broken recording (truncated after")


# Either.


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)


FILES = {
    "no file": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": make_pipe,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a file of 200,000,001 bytes": make_large,
}
ADDRESSES = {
    "a URL that is not there (404)": "{url}/nothing.jpg",
    "a URL that may not be read (403)": "{url}/secret.jpg",
    "a URL of this machine or its network": "{url}/private.jpg",
    "a URL of a cloud's metadata service": "http://169.254.169.254/latest/meta-data/",
    "a URL of the file system": "file:///etc/passwd",
    "a text that is no URL": "http://[::1/a.jpg",
}


@pytest.mark.parametrize("read", [read_picture, read_recording])
@pytest.mark.parametrize("kind", FILES)
def test_file(kind, read, tmp_path):
    FILES[kind](tmp_path / "it")
    assert refused(read, tmp_path / "it") == rows("Either")[kind]


@pytest.mark.parametrize("read", [read_picture, read_recording])
@pytest.mark.parametrize("kind", ADDRESSES)
def test_address(kind, read, monkeypatch):
    with bucket.serving() as web:
        monkeypatch.setenv("OPT_FETCH_HOSTS", "" if "this machine" in kind else "127.0.0.1")
        web.faults["/secret.jpg"] = [bucket.status(403)]
        assert refused(read, ADDRESSES[kind].format(url=web.url)) == rows("Either")[kind]
        assert len(web.asked) == ("HTTP" in rows("Either")[kind])


def test_files_from_the_web_are_those_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("OPT_FETCH_HOSTS", "127.0.0.1")
    with bucket.serving() as web:
        web.files = {"/a.jpg": JPEG, "/a.wav": WAV}
        assert read_picture(f"{web.url}/a.jpg").jpeg == JPEG
        np.testing.assert_allclose(read_recording(f"{web.url}/a.wav"), SOUND, atol=1e-4)


def refused(read, source: Path | str) -> str:
    """The reason, the same twice."""
    reasons = []
    for _ in range(2 if isinstance(source, Path) else 1):
        with pytest.raises(MediaError) as error:
            read(source)
        reasons.append(str(error.value))
    assert len(set(reasons)) == 1
    return reasons[0]


# Memory: peak of a process that reads one file, over what it had before.


def peak_bytes(read: str, path: Path) -> int:
    code = f"""
        import resource
        from pathlib import Path
        from feature_extract.media import MediaError, {read}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            {read}(Path({str(path)!r}))
        except MediaError:
            pass
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


SLACK = 32_000_000
SIDE = 4000


@pytest.mark.parametrize(
    ("kind", "mode", "options", "bytes_a_pixel"),
    [("JPEG", "RGB", {"progressive": True, "subsampling": 0}, 12), ("PNG", "RGBA", {}, 12), ("PNG", "LA", {}, 12),
     ("JPEG", "CMYK", {}, 12), ("WEBP", "RGBA", {}, 17)],
)
def test_memory_of_a_picture_is_bounded(kind, mode, options, bytes_a_pixel, tmp_path):
    (tmp_path / "it").write_bytes(saved(Image.new(mode, (SIDE, SIDE)), kind, **options))
    assert peak_bytes("read_picture", tmp_path / "it") < bytes_a_pixel * SIDE * SIDE + SLACK


@pytest.mark.parametrize("kind", [kind for kind in PICTURES if "bomb" in kind or "10,000" in kind])
def test_memory_of_a_bomb_is_its_file(kind, tmp_path):
    (tmp_path / "it").write_bytes(PICTURES[kind][0])
    assert peak_bytes("read_picture", tmp_path / "it") < SLACK


def test_memory_of_a_long_recording_is_bounded(tmp_path):
    block = np.zeros((48_000 * 60, 2), np.int16)
    block[::1000] = 1000
    with soundfile.SoundFile(tmp_path / "it", "w", 48_000, 2, format="FLAC") as file:
        for _ in range(10):
            file.write(block)
    assert refused(read_recording, tmp_path / "it") == "recording too long (over 300 s)"
    assert peak_bytes("read_recording", tmp_path / "it") < 10 * 300 * 48_000 + (tmp_path / "it").stat().st_size + SLACK
