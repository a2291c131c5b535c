"""Texts for T5: random ids, requests of `coda predict`."""

from collections.abc import Callable, Mapping
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from coda_jax.models.base import Inputs, refuse_font
from coda_jax.models.t5.config import T5Config


def random_tokens(
    config: T5Config, rng: np.random.Generator, batch: int, length: int
) -> np.ndarray:
    """Ids [B, N] int32, neither padding nor end marker."""
    ids = np.setdiff1d(np.arange(config.vocab_size, dtype=np.int32), [config.pad_id, config.eos_id])
    return ids[rng.integers(0, len(ids), (batch, length))]


def encoder(
    config: T5Config, vocabulary: Any, max_length: int, font: str | None = None
) -> Callable[[Mapping[str, str]], np.ndarray]:
    """{"inputs"} -> ids [n] with the end marker; what is too long is left for the model to cut."""
    del config, max_length
    refuse_font(font)
    return lambda record: np.array([*vocabulary.encode(record["inputs"]), vocabulary.eos_id])


def shown(inputs: np.ndarray, vocabulary: Any) -> dict[str, Any]:
    """Ids [n] as the text that each of them adds; see `Inputs.shown`."""
    ids = inputs.tolist()
    whole = [vocabulary.decode(ids[:end]) for end in range(len(ids) + 1)]
    return {"kind": "text", "pieces": [b.removeprefix(a) for a, b in itertools.pairwise(whole)]}


_SERVED = Path(__file__).with_name("served.py")
INPUTS = Inputs("tokens", random_tokens, "inputs", encoder, shown, _SERVED, held=4096)
