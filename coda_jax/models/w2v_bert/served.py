"""Recordings for the programs of an exported folder: a line is the name of a file of 16 kHz.

pip install soundfile
"""

import numpy as np
import soundfile

FIELD = "audio"
_RATE, _WINDOW, _HOP, _FFT, _BINS = 16000, 400, 160, 512, 80


def read(line, served, encode):
    """The frames [n, 1 + 2 * 80] of a recording, cut to what the programs take.

    Args:
        line: the file.
        served: the programs.
        encode: of texts; not used.
    """
    del encode
    samples, rate = soundfile.read(line, always_2d=True)
    if rate != _RATE or len(samples) < _WINDOW + _HOP:
        raise SystemExit(f"{line}: must be of {_RATE} Hz and at least 35 ms, got {rate} Hz")
    return frames(samples.mean(axis=1).astype(np.float32))[: served.longest]


def frames(samples):
    """Kaldi's log-mel filterbanks, normalised over the recording, two windows a frame."""
    windows = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[::_HOP] * 2.0**15
    windows = windows - windows.mean(axis=1, keepdims=True, dtype=np.float64)
    before = np.concatenate([windows[:, :1], windows[:, :-1]], axis=1)
    windows = (windows - 0.97 * before) * np.hanning(_WINDOW) ** 0.85
    power = np.abs(np.fft.rfft(windows, _FFT)) ** 2
    bins = np.log(np.maximum(power @ _filters(), 2.0**-23))
    bins = (bins - bins.mean(axis=0)) / np.sqrt(bins.var(axis=0, ddof=1) + 1e-7)
    pairs = bins[: len(bins) // 2 * 2].reshape(-1, 2 * _BINS)
    return np.pad(pairs, ((0, 0), (1, 0)), constant_values=1).astype(np.float32)


def _filters():
    """Triangles of equal width on the mel scale, from 20 Hz on, [257, 80]."""

    def mel(hertz):
        return 1127.0 * np.log(1.0 + hertz / 700.0)

    edges = np.linspace(mel(20.0), mel(_RATE / 2), _BINS + 2)
    mels = mel(np.arange(_FFT // 2 + 1) * _RATE / _FFT)[:, np.newaxis]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (mels - left) / (centre - left), (right - mels) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling))
