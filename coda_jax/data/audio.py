"""Audio files to the stacked log-mel frames that w2v-BERT 2.0 takes.

The steps are those of the public feature extractor of w2v-BERT 2.0 (Barrault et al. 2023, arXiv
2312.05187), which are Kaldi's filterbanks: windows of 25 ms every 10 ms, without their mean and
with a pre-emphasis, as the log of 80 mel bins, each bin normalised over the utterance; two windows
are one frame.
"""

import math
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from coda_jax.data import audio_containers
from coda_jax.optional import needs

if TYPE_CHECKING:
    import tensorflow as tf

SAMPLE_RATE = 16000
NUM_BINS = 80
STACKED = 2  # windows of a frame
FEATURE_DIM = STACKED * NUM_BINS
WINDOW, HOP, FFT = 400, 160, 512  # samples
MIN_SAMPLES = WINDOW + (STACKED - 1) * HOP  # of one frame
# Of a channel, in the file and at 16 kHz, where it is 35 minutes: three arrays of float64 at once.
MAX_SAMPLES = 2**25
# Hertz of a file. The filter that changes a rate has 20 times as many numbers as the rate, where
# it has no common divisor with 16 kHz; a low one makes many samples of one.
MIN_RATE, MAX_RATE = 1_000, 384_000

_LOWEST_HERTZ = 20.0
_PREEMPHASIS = 0.97
_FULL_SCALE = 2.0**15  # Kaldi counts samples as 16-bit numbers
_MEL_FLOOR = 2.0**-23
_VARIANCE_FLOOR = 1e-7
_READ_AT_ONCE = 2**20  # samples of all channels
_WINDOWS_AT_ONCE = 4096


def read_audio(path: str) -> np.ndarray:
    """Reads a WAV, FLAC, Ogg, MP3 or another file of `audio_containers.FORMATS`.

    Args:
        path: the file, of any sample rate from `MIN_RATE` to `MAX_RATE` and number of channels.

    Returns:
        [samples] float32 at 16 kHz, of -1 to 1 at full scale: the mean of the channels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, ends early or is damaged; has samples that are not finite,
            more than `MAX_SAMPLES`, or fewer than one frame; or another rate. The file is named.
        ImportError: the extra `speech` is not installed.
    """
    with needs("speech"):  # Here: only files need them.
        import scipy.signal
        import soundfile

    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no audio file {path!r}")
    try:
        samples, rate = _read(path)
    except (soundfile.SoundFileError, ValueError, OSError, TypeError) as e:
        raise ValueError(f"{path!r} is not a readable audio file: {e}") from e
    if rate != SAMPLE_RATE and len(samples):
        common = math.gcd(rate, SAMPLE_RATE)
        samples = scipy.signal.resample_poly(samples, SAMPLE_RATE // common, rate // common)
    if len(samples) < MIN_SAMPLES:
        raise ValueError(
            f"{path!r} is too short: {len(samples)} samples at 16 kHz, a frame needs {MIN_SAMPLES}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        samples = samples.astype(np.float32)
    if not np.isfinite(samples).all():
        raise ValueError(f"{path!r} has samples that are not finite, or not in float32")
    return samples


def _read(path: str) -> tuple[np.ndarray, int]:
    """The mean of the channels [samples] float64, and the rate."""
    with needs("speech"):
        import soundfile

    with open(path, "rb") as file:
        if not os.path.getsize(path):
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            audio_containers.check_whole(content)
            digest = audio_containers.flac_digest(content)
    with soundfile.SoundFile(path) as file:
        rate = file.samplerate
        if not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(
                f"its rate is {rate:,} Hz; MIN_RATE is {MIN_RATE:,}, MAX_RATE {MAX_RATE:,}"
            )
        _check_length(file.frames, rate)
        blocks, count = [], 0
        while len(block := file.read(max(1, _READ_AT_ONCE // file.channels), always_2d=True)):
            count += len(block)
            _check_length(count, rate)
            if digest:
                digest[0](block)
            blocks.append(block.mean(axis=1))
        if count < file.frames:
            raise ValueError(f"it ends early: {count:,} of {file.frames:,} samples")
    if digest:
        digest[1]()
    return np.concatenate(blocks) if blocks else np.zeros(0), rate


def _check_length(frames: int, rate: int) -> None:
    """Raises ValueError for more samples of a channel than are read, before they are."""
    most = min(MAX_SAMPLES, MAX_SAMPLES * rate // SAMPLE_RATE)
    if frames > most:
        raise ValueError(
            f"it has {frames:,} samples a channel at {rate:,} Hz; MAX_SAMPLES is {MAX_SAMPLES:,}, "
            f"at 16 kHz, too: cut it into pieces of at most {most // rate:,} seconds"
        )


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

    samples = tf.convert_to_tensor(samples)
    count = tf.size(samples)
    enough = tf.debugging.Assert(count >= MIN_SAMPLES, ["audio of so few samples:", count])
    with tf.control_dependencies([enough]):
        windows = (count - WINDOW) // HOP + 1
    at_once = tf.minimum(windows, _WINDOWS_AT_ONCE)
    starts = tf.range(0, windows, at_once) * HOP
    length = (at_once - 1) * HOP + WINDOW
    padded = tf.pad(samples, [[0, tf.maximum(0, starts[-1] + length - count)]])
    bins = tf.map_fn(
        lambda start: _log_mel(padded[start : start + length]),
        starts,
        fn_output_signature=tf.TensorSpec([None, NUM_BINS], tf.float64),
        parallel_iterations=1,
    )
    bins = tf.reshape(bins, [-1, NUM_BINS])[:windows]
    bins -= tf.reduce_mean(bins, axis=0, keepdims=True)
    freedom = tf.cast(tf.shape(bins)[0] - 1, tf.float64)
    variance = tf.reduce_sum(tf.square(bins), axis=0, keepdims=True) / freedom
    bins = tf.cast(bins / tf.sqrt(variance + _VARIANCE_FLOOR), tf.float32)
    pairs = tf.shape(bins)[0] // STACKED
    return tf.reshape(bins[: STACKED * pairs], [pairs, FEATURE_DIM])


def _log_mel(samples: "tf.Tensor") -> "tf.Tensor":
    """The log of the mel bins of each window, [windows, 80] float64."""
    with needs():
        import tensorflow as tf

    windows = tf.signal.frame(tf.cast(samples, tf.float64) * _FULL_SCALE, WINDOW, HOP)
    windows -= tf.reduce_mean(windows, axis=1, keepdims=True)
    before = tf.concat([windows[:, :1], windows[:, :-1]], axis=1)
    windows = (windows - _PREEMPHASIS * before) * np.hanning(WINDOW) ** 0.85
    spectrum = tf.signal.rfft(windows, [FFT])
    power = tf.square(tf.math.real(spectrum)) + tf.square(tf.math.imag(spectrum))
    return tf.math.log(tf.maximum(power @ mel_filters(), _MEL_FLOOR))


def frames(samples: "tf.Tensor") -> "tf.Tensor":
    """The encoder's inputs, [N, 1 + 160] float32: 1, which says that it is a frame, and features.

    Args:
        samples: as `features` takes them.
    """
    with needs():
        import tensorflow as tf

    found = features(samples)
    return tf.concat([tf.ones_like(found[:, :1]), found], axis=1)
