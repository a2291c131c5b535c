"""Tasks from speech to text that need no download.

Importing this module registers, for bytes: `spoken_digits`, a few English digits scattered over
eight seconds of noise -> the digits, with spaces between; and to pretrain on,
`spoken_digits_clean`, the same in four seconds of little noise.

No voice, pitch or noise of a held-out split of `spoken_digits` is in training:

| task | split | voices | pitches | signal over noise |
|---|---|---|---|---|
| `spoken_digits_clean` | train | Spanish, French, Italian, German | `PITCHES` | 15 to 40 dB |
| | validation, test | the same | `PITCHES_HELD_OUT` | 15 to 40 dB |
| `spoken_digits` | train | these, American | `PITCHES` | 5 to 20 dB |
| | validation, test | British | `PITCHES_HELD_OUT` | 5 to 20 dB |

Where voices.py falls back on captcha's clips, all of these are one voice at several speeds.
"""

import dataclasses
import functools
import itertools

import numpy as np
import tensorflow as tf

from coda_jax.data import audio
from coda_jax.data.seqio_tasks import seqio_vocabulary
from coda_jax.optional import needs
from coda_jax.tasks import drawn, speech, voices
from coda_jax.tasks.drawn import SPLITS

with needs("speech"):
    import scipy.signal

PITCHES = (0.7, 0.85, 1.0, 1.2, 1.4)
PITCHES_HELD_OUT = (0.77, 0.92, 1.1, 1.3)
SPEEDS = (0.85, 1.0, 1.25)
TEMPO = (0.8, 1.25)  # how many times as fast training speech is played
NOISE_COLOUR = (0.0, 1.0)  # exponent of 1 / frequency in its power: white to pink
PEAK = 0.5  # of a recording, where full scale is 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the recordings of a split are made.

    Attributes:
        speakers: of whom each recording has one.
        seconds: the length.
        digits: the fewest and the most in a recording.
        decibels: the lowest and the highest level of the speech, while it lasts, over the noise.
        tempo: the lowest and the highest factor by which a recording's speech is played faster,
            which shifts all frequencies: as if by another speaker (Ko et al. 2015, speed
            perturbation).
    """

    speakers: tuple[voices.Speaker, ...]
    seconds: float
    digits: tuple[int, int]
    decibels: tuple[float, float]
    tempo: tuple[float, float]


def _recipes(training, held_out, **shared) -> dict[str, Recipe]:
    """Recipes by split, of voices for training and for the held-out splits."""

    def recipe(names, pitches, tempo):
        speakers = itertools.starmap(voices.Speaker, itertools.product(names, pitches, SPEEDS))
        return Recipe(tuple(speakers), tempo=tempo, **shared)

    held_out = recipe(held_out, PITCHES_HELD_OUT, (1.0, 1.0))
    return {"train": recipe(training, PITCHES, TEMPO)} | dict.fromkeys(SPLITS[1:], held_out)


VOICES = ("es-ES", "fr-FR", "it-IT", "de-DE", "en-US", "en-GB")
RECIPES = {
    "spoken_digits": _recipes(
        VOICES[:-1], VOICES[-1:], seconds=8.0, digits=(2, 5), decibels=(5.0, 20.0)
    ),
    "spoken_digits_clean": _recipes(
        VOICES[:4], VOICES[:4], seconds=4.0, digits=(1, 3), decibels=(15.0, 40.0)
    ),
}


def noise(rng: np.random.Generator, length: int, colour: float) -> np.ndarray:
    """Gaussian noise [length] float32 of power 1 / frequency^colour and root mean square 1."""
    bins = np.fft.rfft(rng.standard_normal(length, dtype=np.float32))
    bins[0] = 0
    bins[1:] *= np.arange(1, len(bins), dtype=np.float32) ** (-colour / 2)
    samples = np.fft.irfft(bins, length)
    return (samples / np.sqrt(np.mean(samples**2))).astype(np.float32)


def played(clip: np.ndarray, tempo: float) -> np.ndarray:
    """Returns a clip [samples], played `tempo` times as fast and so as high."""
    return scipy.signal.resample(clip, round(len(clip) / tempo)).astype(clip.dtype)


def spoken_digits(task: str, split: str, number: int) -> tuple[np.ndarray, str]:
    """Makes a recording: digits of one speaker, one after the other at random places, in noise.

    Args:
        task: a key of `RECIPES`.
        split: one of `SPLITS`.
        number: of the recording; the same number gives the same recording.

    Returns:
        [samples] float32 at 16 kHz, and the digits with spaces between.
    """
    recipe = RECIPES[task][split]
    rng = np.random.default_rng([list(RECIPES).index(task), SPLITS.index(split), number])
    clips = voices.recordings(recipe.speakers)[rng.integers(len(recipe.speakers))]
    digits = rng.integers(len(clips), size=rng.integers(recipe.digits[0], recipe.digits[1] + 1))
    tempo = rng.uniform(*recipe.tempo)
    spoken = [played(clips[digit], tempo) for digit in digits]
    lengths = np.array([len(clip) for clip in spoken])
    total = round(recipe.seconds * audio.SAMPLE_RATE)
    starts = drawn.scattered(lengths, total, rng)
    level = 10 ** (-rng.uniform(*recipe.decibels) / 20)
    samples = level * noise(rng, total, rng.uniform(*NOISE_COLOUR))
    for clip, start in zip(spoken, starts, strict=True):
        samples[start : start + len(clip)] += clip
    return samples * (PEAK / np.abs(samples).max()), " ".join(map(str, digits))


def _frames(samples: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"inputs": audio.frames(tf.ensure_shape(samples, [None]))}


def _prepare(task: str, split: str) -> None:
    voices.recordings(RECIPES[task][split].speakers)


for _task in RECIPES:
    speech.add_task(
        _task,
        drawn.source(functools.partial(_prepare, _task)),
        drawn.step(functools.partial(spoken_digits, _task), tf.float32, _frames),
        seqio_vocabulary("bytes"),
    )
