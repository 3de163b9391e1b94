"""Speak one utterance with espeak-ng and end: a program, run in a fresh process for every utterance.

espeak-ng keeps state: the same sentence gives other samples the second time within one process. So this file is
started anew (`python -I -S speak_once.py LIBRARY DATA VOICE RATE PITCH TEXT`, about 20 ms; it imports as little as it
can) and writes to standard output one line "HZ CHARACTER:MILLISECONDS ..." with the place and time of each word, then
the samples, 16-bit mono.
"""

import ctypes
import sys

RETRIEVAL, RATE, PITCH, UTF8, WORD_EVENT = 1, 1, 3, 1, 1


class Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("character", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("detail", ctypes.c_char * 8),
    ]


def main(library_path: str, data_path: str, voice: str, words_a_minute: int, pitch: int, text: str) -> None:
    """Speak `text` to standard output. Exits with a sentence when the library or the voice is missing."""
    library = ctypes.CDLL(library_path)
    samples = bytearray()
    words: list[tuple[int, int]] = []

    def receive(wave: int | None, count: int, events: "ctypes._Pointer[Event]") -> int:
        if wave and count > 0:
            samples.extend(ctypes.string_at(wave, 2 * count))
        number = 0
        while events[number].kind != 0:
            if events[number].kind == WORD_EVENT:
                words.append((events[number].character - 1, events[number].milliseconds))
            number += 1
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event))(receive)
    rate = library.espeak_Initialize(RETRIEVAL, 200, data_path.encode(), 0)
    if rate <= 0:
        sys.exit(f"espeak-ng did not start with the data in {data_path}")
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        sys.exit(f"espeak-ng has no voice {voice!r}")
    library.espeak_SetParameter(RATE, words_a_minute, 0)
    library.espeak_SetParameter(PITCH, pitch, 0)
    content = text.encode() + b"\0"
    if library.espeak_Synth(content, ctypes.c_size_t(len(content)), 0, 1, 0, UTF8, None, None) != 0:
        sys.exit(f"espeak-ng could not speak {text!r}")
    library.espeak_Synchronize()
    head = " ".join([str(rate), *(f"{character}:{milliseconds}" for character, milliseconds in words)])
    sys.stdout.buffer.write(head.encode() + b"\n" + bytes(samples))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
