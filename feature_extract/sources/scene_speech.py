"""The speech of a spoken scene: a caption read by espeak-ng, with background noise and a few words drowned in noise.

    caption --espeak-ng, a fresh process--> 22,050 Hz --soxr--> 16,000 Hz --noise--> Speech

Shape legend: S samples at 16 kHz, W words of the caption.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opt.config import UserError

SAMPLE_RATE = 16_000
DROWNED_SHARE = 0.05
"""How many of the words are drowned in noise."""

VOICES = (
    "en-us", "en-us+m1", "en-us+m3", "en-us+m7", "en-us+f1", "en-us+m5", "en-us+f4",
    "en", "en+m2", "en+f4", "en+m5", "en-gb-x-rp+f1",
)  # fmt: skip
"""No variant with breath (f2, f3, f5 and others): espeak-ng 1.52 fills it from uninitialised memory."""


@dataclass(frozen=True)
class Voice:
    """Who speaks and over what: number in `VOICES`, words a minute, pitch (0 to 99), noise (dB under the speech)."""

    number: int
    words_a_minute: int
    pitch: int
    noise_db: float

    @property
    def name(self) -> str:
        """What espeak-ng calls the voice."""
        return VOICES[self.number]


@dataclass(frozen=True)
class Speech:
    """One recording. samples (S,) float32 at 16 kHz; begins, ends: seconds of the W words; drowned: word numbers."""

    samples: np.ndarray
    begins: tuple[float, ...]
    ends: tuple[float, ...]
    drowned: tuple[int, ...]


def draw_voice(rng: np.random.Generator) -> Voice:
    """A voice at random: 180 to 230 words a minute, noise 15 to 40 dB under the speech."""
    return Voice(
        number=int(rng.integers(len(VOICES))),
        words_a_minute=int(rng.integers(180, 231)),
        pitch=int(rng.integers(30, 71)),
        noise_db=float(rng.uniform(15, 40)),
    )


def speak(caption: str, voice: Voice, rng: np.random.Generator) -> Speech:
    """The caption spoken: a pure function of its arguments. UserError when espeak-ng is not installed or fails."""
    clean, starts = _synthesise(caption, voice)
    total = len(clean) / SAMPLE_RATE
    ends = (*starts[1:], total)
    loudness = float(np.sqrt(np.mean(clean**2))) + 1e-6
    samples = clean + _coloured_noise(len(clean), rng) * loudness * 10 ** (-voice.noise_db / 20)
    drowned = tuple(int(word) for word in np.flatnonzero(rng.random(len(starts)) < DROWNED_SHARE))
    for word in drowned:
        begin, end = (int(second * SAMPLE_RATE) for second in (starts[word], ends[word]))
        burst = _coloured_noise(end - begin, rng) * loudness * 2.0
        samples[begin:end] = 0.3 * samples[begin:end] + burst
    samples *= 0.5 / max(0.5, float(np.abs(samples).max()))
    return Speech(samples.astype(np.float32), tuple(starts), ends, drowned)


def _synthesise(caption: str, voice: Voice) -> tuple[np.ndarray, list[float]]:
    """Clean samples (S,) float64 at 16 kHz with a tenth of a second of silence at each end; the W words' starts."""
    try:
        import espeakng_loader
        import soxr
    except ImportError as error:
        raise UserError(f"spoken scenes need the package {error.name!r}: pip install espeakng-loader soxr") from error
    program = Path(__file__).with_name("speak_once.py")
    options = [voice.name, str(voice.words_a_minute), str(voice.pitch), caption]
    command = [
        sys.executable,
        "-I",
        "-S",
        str(program),
        espeakng_loader.get_library_path(),
        espeakng_loader.get_data_path(),
    ]
    answer = subprocess.run([*command, *options], capture_output=True)
    if answer.returncode != 0:
        raise UserError(f"espeak-ng failed on {caption!r}: {answer.stderr.decode(errors='replace').strip()}")
    head, _, sound = answer.stdout.partition(b"\n")
    rate, *places = head.decode().split()
    events = [tuple(map(int, place.split(":"))) for place in places]
    samples = soxr.resample(np.frombuffer(sound, np.int16).astype(np.float64) / 32768, int(rate), SAMPLE_RATE)
    voiced = np.flatnonzero(np.abs(samples) > 0.01)
    last = int(voiced[-1]) + 1 if len(voiced) else len(samples)
    silence = np.zeros(SAMPLE_RATE // 10)
    starts = _word_starts(caption, events, last / SAMPLE_RATE)
    return np.concatenate([silence, samples[:last], silence]), [start + len(silence) / SAMPLE_RATE for start in starts]


def _word_starts(caption: str, events: list[tuple[int, ...]], seconds: float) -> list[float]:
    """Seconds at which each word begins. espeak-ng merges short words ("of the"): those are placed by characters."""
    known = {character: milliseconds / 1000 for character, milliseconds in events}
    characters, at = [], 0
    for word in caption.split():
        at = caption.index(word, at)
        characters.append(at)
        at += len(word)
    anchors = {character: min(known[character], seconds) for character in characters if character in known}
    anchors |= {0: 0.0, len(caption): seconds}
    places = sorted(anchors)
    return [float(np.interp(character, places, [anchors[place] for place in places])) for character in characters]


def _coloured_noise(count: int, rng: np.random.Generator) -> np.ndarray:
    """Noise (count,) of unit power, low frequencies a little stronger, as in a room."""
    white = rng.standard_normal(count + 1)
    noise = white[1:] + 0.7 * white[:-1]
    return noise / np.sqrt(1 + 0.7**2)
