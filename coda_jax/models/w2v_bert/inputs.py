"""Recordings for w2v-BERT: random frames, requests of `coda predict`, what a checkpoint says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coda_jax.models import preprocessing
from coda_jax.models.base import Inputs, refuse_font
from coda_jax.models.w2v_bert.config import W2vBertConfig
from coda_jax.optional import needs


def random_frames(
    config: W2vBertConfig, rng: np.random.Generator, batch: int, length: int
) -> np.ndarray:
    """Frames [B, N, 1 + F] float32, none of them padding."""
    frames = rng.standard_normal(config.input_spec(batch, length).shape, np.float32)
    frames[..., 0] = 1
    return frames


def encoder(
    config: W2vBertConfig, vocabulary: Any, max_length: int, font: str | None = None
) -> Callable[[Mapping[str, str]], np.ndarray]:
    """{"audio"} -> frames [n, 1 + F]; what is too long is left for the model to cut."""
    from coda_jax.data import audio  # which needs more than other families have

    del config, vocabulary, max_length
    refuse_font(font)
    with needs("speech"):  # now, and not when the first file is read
        import scipy.signal  # noqa: F401
        import soundfile  # noqa: F401
    return lambda record: np.asarray(audio.frames(audio.read_audio(record["audio"])))


def shown(inputs: np.ndarray, vocabulary: Any) -> dict[str, Any]:
    """Frames [n, 1 + F] as their spectrogram; see `Inputs.shown`."""
    from coda_jax.data import audio

    del vocabulary
    seconds = audio.STACKED * audio.HOP / audio.SAMPLE_RATE
    bins = inputs[:, 1:].reshape(-1, audio.NUM_BINS)
    return {"kind": "sound", "spectrogram": bins, "seconds": seconds}


def of_checkpoint(inputs: Inputs, directory: Path, config: W2vBertConfig) -> Inputs:
    """The same; ValueError where a checkpoint's own files ask for other frames."""
    bins = config.feature_dim // 2
    fixed = {"sampling_rate": 16000, "stride": 2, "feature_size": bins, "num_mel_bins": bins}
    preprocessing.read(directory, set(), {name: (value,) for name, value in fixed.items()})
    return inputs


INPUTS = Inputs(  # of 30 seconds
    "frames",
    random_frames,
    "audio",
    encoder,
    shown,
    Path(__file__).with_name("served.py"),
    longest=1500,
    reads_files=True,
    of_checkpoint=of_checkpoint,
)
