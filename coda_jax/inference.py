"""Outputs for lists of inputs: batches of equal, bucketed lengths, so that little is compiled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from coda_jax.models import ModelConfig
from coda_jax.objectives import Model, model_for
from coda_jax.sharding import Placement

_SHORTEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How outputs are searched for.

    Attributes:
        max_input_length: the most tokens of an input, the end marker included, or patches.
        max_decode_length: the most tokens of an output, the end marker included.
        num_beams: 1 for greedy decoding.
        alpha: of the length penalty ((5 + length) / 6) ** alpha.
        batch_size: inputs decoded at once; a multiple of the number of devices.
    """

    max_input_length: int = 512
    max_decode_length: int = 64
    num_beams: int = 1
    alpha: float = 0.6
    batch_size: int = 32

    def __post_init__(self):
        for name in ("max_input_length", "max_decode_length", "num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Decoding.{name} must be at least 1, got {getattr(self, name)}")


def bucket(length: int, longest: int) -> int:
    """The padded length of an input: the next power of two, at least 32 and at most `longest`."""
    return min(longest, max(_SHORTEST_BUCKET, 1 << (max(length, 1) - 1).bit_length()))


def predict_function(
    model: Model, decoding: Decoding
) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
    """(parameters, inputs [B, N, ...]) -> output tokens [B, max_decode_length]."""
    return functools.partial(
        model.predict,
        max_decode_length=decoding.max_decode_length,
        num_beams=decoding.num_beams,
        alpha=decoding.alpha,
    )


class Predictor:
    """A model ready to answer; it compiles one program per bucket of input lengths."""

    def __init__(
        self, config: ModelConfig, params: Mapping[str, Any], decoding: Decoding = Decoding()
    ):
        self.decoding = decoding
        self.num_truncated = 0
        self._model = model_for(config)
        self._placement = Placement()
        self._params = self._placement.params(params)
        self._predict = jax.jit(predict_function(self._model, decoding))

    @property
    def num_programs(self) -> int:
        """How many programs have been compiled."""
        return self._predict._cache_size()

    def __call__(self, inputs: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """The output tokens of each input, in batches of similar lengths.

        Args:
            inputs: arrays of tokens, each with its end marker, or of patches. What is longer than
                `max_input_length` is cut and counted in `num_truncated`.

        Yields:
            (index of the input, its output tokens [max_decode_length], 0 after the end marker).
        """
        size, longest = self.decoding.batch_size, self.decoding.max_input_length
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        self.num_truncated += sum(len(tokens) > longest for tokens in inputs)
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            length = bucket(len(inputs[indices[-1]]), longest)
            spec = self._model.config.input_spec(size, length)
            batch = np.zeros(spec.shape, spec.dtype)
            for row, index in enumerate(indices):
                tokens = inputs[index][:length]
                batch[row, : len(tokens)] = tokens
            outputs = self._predict(
                self._params, self._placement.batch({"tokens": batch})["tokens"]
            )
            yield from zip(indices, np.asarray(outputs), strict=False)  # the last batch has spares
