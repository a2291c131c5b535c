"""Voices that say the ten digits, without any download.

`py-nanotts` has six voices, each made for one language. All of them say the English digits: those
of other languages read them from a spelling of their own, so with an accent. Where it has no wheel,
the voice is that of captcha's clips.
"""

from collections.abc import Sequence
from fractions import Fraction
import functools
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import NamedTuple
import warnings

import numpy as np

from coda_jax.data.audio import read_audio
from coda_jax.optional import needs

ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPELLINGS = {
    "en-GB": ENGLISH,
    "en-US": ENGLISH,
    "de-DE": ("siero", "uann", "tuh", "sri", "for", "faif", "siks", "sewen", "eit", "nein"),
    "es-ES": ("síro", "uán", "tu", "sri", "for", "fáiv", "six", "séven", "éit", "náin"),
    "fr-FR": (
        "zirô", "ouanne", "tout", "srie", "fore", "faïve", "sixe", "sévenne", "hêïte", "naïne",
    ),
    "it-IT": ("zíro", "uan", "tu", "sri", "for", "faiv", "sics", "séven", "éit", "nain"),
}  # fmt: skip

SILENCE = 0.01  # of the loudest moment: what is less is trimmed at both ends
MOMENT = 400  # samples over which loudness is measured


class Speaker(NamedTuple):
    """One way of saying digits.

    Attributes:
        voice: a key of `SPELLINGS`.
        pitch: 1 for the voice's own.
        speed: 1 for the voice's own.
    """

    voice: str
    pitch: float
    speed: float


@functools.cache
def recordings(speakers: tuple[Speaker, ...]) -> tuple[tuple[np.ndarray, ...], ...]:
    """Recordings of the ten digits by each speaker.

    Without `py-nanotts`, which a warning says, all speakers are the one voice of captcha's clips,
    played as many times faster as their pitch and speed together.

    Returns:
        For each speaker, the clips of the digits 0 to 9: [samples] float32 at 16 kHz without
        silence around them, of root mean square 1.

    Raises:
        ImportError: the extra `speech` is not installed.
    """
    if importlib.util.find_spec("py_nanotts"):
        clips = _synthesised(speakers)
    elif importlib.util.find_spec("captcha"):
        warnings.warn(
            "py-nanotts is not installed (it has wheels for Linux and Windows): all digits are "
            "captcha's recordings of one voice, played faster or slower",
            stacklevel=2,
        )
        clips = _bundled(speakers)
    else:
        raise ImportError("spoken digits need the extra `speech`: pip install 'coda_jax[speech]'")
    count = len(ENGLISH)
    clips = [_trimmed(clip) for clip in clips]
    return tuple(tuple(clips[i : i + count]) for i in range(0, len(clips), count))


# What `_synthesised` runs: requests as JSON in, a line of hexadecimal digits for each out.
_SYNTHESISER = """
import json, sys
from py_nanotts import NanoTTS
for request in json.load(sys.stdin):
    print(NanoTTS().speak(**request).hex())
"""


def _synthesised(speakers: Sequence[Speaker]) -> list[np.ndarray]:
    """All digits of the first speaker, then those of the next, as the synthesiser says them.

    The synthesiser reads memory that it has not written, so that what it says depends, in its last
    bits, on what the process did before. In a process whose large buffers are always fresh from the
    kernel, which fills them with zeros, the same request always gives the same samples.
    """
    requests = [
        {"text": text, **speaker._asdict()}
        for speaker in speakers
        for text in SPELLINGS[speaker.voice]
    ]
    allocator = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(allocator)}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    result = subprocess.run(
        [sys.executable, "-c", _SYNTHESISER],
        input=json.dumps(requests),
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    samples = (np.frombuffer(bytes.fromhex(line), "<i2") for line in result.stdout.splitlines())
    return [clip / 2.0**15 for clip in samples]


def _bundled(speakers: Sequence[Speaker]) -> list[np.ndarray]:
    """As `_synthesised`, of captcha's clips."""
    with needs("speech"):  # Here: only this needs them.
        import captcha
        import scipy.signal

    folder = Path(captcha.__file__).parent / "data"
    digits = [read_audio(str(folder / str(i) / "default.wav")) for i in range(len(ENGLISH))]
    clips = []
    for speaker in speakers:
        factor = Fraction(speaker.pitch * speaker.speed).limit_denominator(100)
        for clip in digits:
            clips.append(scipy.signal.resample_poly(clip, factor.denominator, factor.numerator))
    return clips


def _trimmed(clip: np.ndarray) -> np.ndarray:
    """The clip without silence at its ends, of root mean square 1."""
    loudness = np.sqrt(np.convolve(clip**2, np.ones(MOMENT) / MOMENT, mode="same"))
    loud = np.flatnonzero(loudness > SILENCE * loudness.max())
    clip = clip[loud[0] : loud[-1] + 1]
    return (clip / np.sqrt(np.mean(clip**2))).astype(np.float32)
