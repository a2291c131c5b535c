"""Audio files to the stacked log-mel frames that w2v-BERT 2.0 takes.

The steps are those of the public feature extractor of w2v-BERT 2.0 (Barrault et al. 2023, arXiv
2312.05187), which are Kaldi's filterbanks: windows of 25 ms every 10 ms, without their mean and
with a pre-emphasis, as the log of 80 mel bins, each bin normalised over the utterance; two windows
are one frame.
"""

import math
import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from coda_jax.optional import needs

if TYPE_CHECKING:
    import tensorflow as tf

SAMPLE_RATE = 16000
NUM_BINS = 80
STACKED = 2  # windows of a frame
FEATURE_DIM = STACKED * NUM_BINS
WINDOW, HOP, FFT = 400, 160, 512  # samples
MIN_SAMPLES = WINDOW + (STACKED - 1) * HOP  # of one frame

_LOWEST_HERTZ = 20.0
_PREEMPHASIS = 0.97
_FULL_SCALE = 2.0**15  # Kaldi counts samples as 16-bit numbers
_MEL_FLOOR = 2.0**-23
_VARIANCE_FLOOR = 1e-7
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # which programs write that do not know how much is to come


def read_audio(path: str) -> np.ndarray:
    """Reads a file of any kind that libsndfile knows: WAV, FLAC, Ogg, MP3 and others.

    Args:
        path: the file, of any sample rate and number of channels.

    Returns:
        [samples] float32 at 16 kHz, of -1 to 1 at full scale: the mean of the channels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no complete audio file, has samples that are not finite, or is shorter
            than one frame; the file is named.
        ImportError: the extra `speech` is not installed.
    """
    with needs("speech"):  # Here: only files need them.
        import scipy.signal
        import soundfile

    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no audio file {path!r}")
    try:
        _check_riff_size(path)
        samples, rate = soundfile.read(path, dtype="float64", always_2d=True)
    except (soundfile.SoundFileError, ValueError) as e:
        raise ValueError(f"{path!r} is not a readable audio file: {e}") from e
    if not np.isfinite(samples).all():
        raise ValueError(f"{path!r} has samples that are not finite")
    samples = samples.mean(axis=1)
    if rate != SAMPLE_RATE and len(samples):
        common = math.gcd(rate, SAMPLE_RATE)
        samples = scipy.signal.resample_poly(samples, SAMPLE_RATE // common, rate // common)
    if len(samples) < MIN_SAMPLES:
        raise ValueError(
            f"{path!r} is too short: {len(samples)} samples at 16 kHz, a frame needs {MIN_SAMPLES}"
        )
    return samples.astype(np.float32)


def _check_riff_size(path: str) -> None:
    """Raises ValueError for a WAV file that ends early, which libsndfile reads up to there."""
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) == 8 and start[:4] == b"RIFF":
        (declared,) = struct.unpack("<I", start[4:])
        size = os.path.getsize(path)
        if declared not in _UNKNOWN_SIZES and declared + 8 > size:
            raise ValueError(f"it has {size} of {declared + 8} bytes")


def _mel(hertz):
    return 1127.0 * np.log(1.0 + hertz / 700.0)


def mel_filters() -> np.ndarray:
    """Returns Kaldi's filters [FFT / 2 + 1, 80]: triangles of equal width on the mel scale."""
    edges = np.linspace(_mel(_LOWEST_HERTZ), _mel(SAMPLE_RATE / 2), NUM_BINS + 2)
    mels = _mel(np.arange(FFT // 2 + 1) * SAMPLE_RATE / FFT)[:, np.newaxis]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (mels - left) / (centre - left), (right - mels) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling))


def features(samples: "tf.Tensor") -> "tf.Tensor":
    """Normalised log-mel filterbanks, two windows a frame.

    Args:
        samples: [samples] float at 16 kHz, of -1 to 1 at full scale.

    Returns:
        [N, 160] float32 with N = windows // 2; a last window without a partner is left out, as the
        public extractor masks it. Each bin has mean 0 and variance 1 over the windows; one that
        never changes is 0, and so is all of a silent utterance.

    Raises:
        tf.errors.InvalidArgumentError: fewer samples than one frame has.
    """
    with needs():  # Here: only frames need it.
        import tensorflow as tf

    samples = tf.cast(samples, tf.float64)
    count = tf.size(samples)
    enough = tf.debugging.Assert(count >= MIN_SAMPLES, ["audio of so few samples:", count])
    with tf.control_dependencies([enough]):
        windows = tf.signal.frame(samples * _FULL_SCALE, WINDOW, HOP)
    windows -= tf.reduce_mean(windows, axis=1, keepdims=True)
    before = tf.concat([windows[:, :1], windows[:, :-1]], axis=1)
    windows = (windows - _PREEMPHASIS * before) * np.hanning(WINDOW) ** 0.85
    spectrum = tf.signal.rfft(windows, [FFT])
    power = tf.square(tf.math.real(spectrum)) + tf.square(tf.math.imag(spectrum))
    bins = tf.math.log(tf.maximum(power @ mel_filters(), _MEL_FLOOR))
    bins -= tf.reduce_mean(bins, axis=0, keepdims=True)
    freedom = tf.cast(tf.shape(bins)[0] - 1, tf.float64)
    variance = tf.reduce_sum(tf.square(bins), axis=0, keepdims=True) / freedom
    bins = tf.cast(bins / tf.sqrt(variance + _VARIANCE_FLOOR), tf.float32)
    pairs = tf.shape(bins)[0] // STACKED
    return tf.reshape(bins[: STACKED * pairs], [pairs, FEATURE_DIM])


def frames(samples: "tf.Tensor") -> "tf.Tensor":
    """The encoder's inputs, [N, 1 + 160] float32: 1, which says that it is a frame, and features.

    Args:
        samples: as `features` takes them.
    """
    with needs():
        import tensorflow as tf

    found = features(samples)
    return tf.concat([tf.ones_like(found[:, :1]), found], axis=1)
