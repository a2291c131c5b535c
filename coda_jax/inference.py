"""Outputs for lists of inputs: batches of equal, bucketed lengths, so that little is compiled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import numpy as np

from coda_jax.data.stop_texts import stop_table
from coda_jax.data.vocabularies import Vocabulary
from coda_jax.models import ModelConfig
from coda_jax.objectives import Generation, Model, model_for
from coda_jax.sharding import Placement

_SHORTEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Decoding(Generation):
    """How outputs are made, and of which inputs at once.

    Attributes:
        max_input_length: the most tokens of an input, the end marker included, or patches.
        batch_size: inputs decoded at once; a multiple of the number of devices.
    """

    max_input_length: int = 512
    batch_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_input_length", "batch_size"):
            self._check_number(name, "at least 1")


def bucket(length: int, longest: int) -> int:
    """The padded length of an input: the next power of two, at least 32 and at most `longest`."""
    return min(longest, max(_SHORTEST_BUCKET, 1 << (max(length, 1) - 1).bit_length()))


def generate_function(model: Model, decoding: Decoding) -> Callable[..., tuple[Array, Array]]:
    """(parameters, inputs [B, N, ...]) -> tokens [B, n, L] and scores [B, n].

    Where tokens are drawn it takes the arguments `seed` and `numbers`, where there are stop texts
    `stops`: see `Seq2Seq.generate`.
    """
    return functools.partial(model.generate, generation=decoding)


class Predictor:
    """A model ready to answer; it compiles one program per bucket of input lengths.

    Args:
        config: of the model.
        params: its parameters.
        decoding: how it answers.
        vocabulary: of its outputs; needed where there are stop texts.

    Attributes:
        decoding: the same, with nothing left open.
        num_truncated: inputs that were too long so far.

    Raises:
        ValueError: options contradict each other, or a vocabulary is missing.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        decoding: Decoding = Decoding(),
        vocabulary: Vocabulary | None = None,
    ):
        self.decoding = decoding = decoding.resolved()
        self.num_truncated = 0
        self._model = model_for(config)
        self._model.check_generation(decoding)
        self._placement = Placement()
        self._params = self._placement.params(params)
        self._generate = jax.jit(generate_function(self._model, decoding))
        self._stops = {}
        if decoding.stop_strings:
            table = stops_of(decoding, vocabulary, config)
            self._stops["stops"] = jax.device_put(table, self._placement.replicated)

    @property
    def num_programs(self) -> int:
        """How many programs have been compiled, but for those of `stream`."""
        return self._generate._cache_size()

    def __call__(
        self, inputs: Sequence[np.ndarray], first: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The best output of each input: see `candidates`.

        Yields:
            (index of the input, its output tokens [L], padding after the end marker).
        """
        for index, tokens, _ in self.candidates(inputs, first):
            yield index, tokens[0]

    def candidates(
        self, inputs: Sequence[np.ndarray], first: int = 0
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The outputs of each input, in batches of similar lengths.

        Args:
            inputs: arrays of tokens, each with its end marker, or of patches. What is longer than
                `max_input_length` is cut and counted in `num_truncated`.
            first: number of the first of them in a longer list. What is drawn for an input depends
                on its number, and not on the other inputs.

        Yields:
            (index of the input, its output tokens [n, L], the best first, padding after the end
            marker, and their scores [n]).
        """
        size = self.decoding.batch_size
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            batch = self._batch([inputs[index] for index in indices], size)
            numbers = [first + index for index in indices]
            found = self._generate(self._params, batch, **self._arguments(numbers, size))
            # The last batch has spares.
            yield from zip(indices, *map(np.asarray, found), strict=False)

    def stream(self, tokens: np.ndarray, number: int = 0) -> Iterator[int]:
        """The tokens of an output as they come: what `__call__` gives, up to the end marker.

        Args:
            tokens: the input, as in `candidates`.
            number: of the input in a list, on which its draws depend.

        Raises:
            ValueError: beams, which may yet take back what they have chosen; several outputs.
        """
        begin, grow = self._stepwise
        size = self._placement.mesh.size  # one input, and a spare row for each other device
        batch = self._batch([tokens], size)
        encoded, rows = begin(self._params, batch, **self._arguments([number], size))
        return self._streamed(batch, encoded, rows, grow)

    def _streamed(self, batch, encoded, rows, grow) -> Iterator[int]:
        yield from self.decoding.decoder_prefix
        for place in range(len(self.decoding.decoder_prefix) + 1, rows.tokens.shape[1]):
            rows = grow(self._params, batch, encoded, rows, **self._stops)
            yield int(rows.tokens[0, place])
            if rows.ended[0]:
                return

    @functools.cached_property
    def _stepwise(self) -> tuple[Callable, Callable]:
        begin, grow = self._model.stepwise(self.decoding)
        return jax.jit(begin), jax.jit(grow, donate_argnums=3)

    def _batch(self, inputs: Sequence[np.ndarray], size: int) -> Array:
        """Some inputs in a batch of a size, cut to the longest bucket and filled up."""
        longest = self.decoding.max_input_length
        self.num_truncated += sum(len(tokens) > longest for tokens in inputs)
        length = bucket(max(map(len, inputs)), longest)
        config = self._model.config
        spec = config.input_spec(size, length)
        fill = config.pad_id if np.issubdtype(spec.dtype, np.integer) else 0
        batch = np.full(spec.shape, fill, spec.dtype)
        for row, tokens in zip(batch, inputs, strict=False):
            row[: len(tokens)] = tokens[:length]
        return self._placement.batch({"tokens": batch})["tokens"]

    def _arguments(self, numbers: Sequence[int], size: int) -> dict[str, Array]:
        """What a program takes beside parameters and inputs."""
        if not self.decoding.do_sample:
            return self._stops
        filled = np.zeros(size, np.uint32)
        filled[: len(numbers)] = numbers
        placed = self._placement.batch({"numbers": filled})
        return {**self._stops, **placed, "seed": np.uint32(self.decoding.seed)}


def stops_of(decoding: Decoding, vocabulary: Vocabulary | None, config: ModelConfig) -> np.ndarray:
    """The table of the stop texts, for a model's tokens.

    Raises:
        ValueError: there is no vocabulary.
    """
    if vocabulary is None:
        raise ValueError(f"stop_strings={decoding.stop_strings} need a vocabulary")
    return stop_table(vocabulary, decoding.stop_strings, config.vocab_size)
