"""Outputs for lists of inputs: batches of equal, bucketed lengths, so that little is compiled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from coda_jax import checks, trees
from coda_jax.data.stop_texts import stop_table
from coda_jax.data.vocabularies import Vocabulary
from coda_jax.models import ModelConfig
from coda_jax.nn.tokens import pool
from coda_jax.objectives import Generation, Model, model_for
from coda_jax.sharding import Placement

EMBEDDINGS = ("mean", "tokens")
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
        checks.fields(self, max_input_length=checks.COUNT, batch_size=checks.COUNT)


def bucket(length: int, longest: int) -> int:
    """The padded length of an input: the next power of two, at least 32 and at most `longest`."""
    return min(longest, max(_SHORTEST_BUCKET, 1 << (max(length, 1) - 1).bit_length()))


def generate_function(model: Model, decoding: Decoding) -> Callable[..., tuple[Array, Array]]:
    """(parameters, inputs [B, N, ...]) -> tokens [B, n, L] and scores [B, n].

    Where tokens are drawn it takes the arguments `seed` and `numbers`, where there are stop texts
    `stops`: see `Seq2Seq.generate`.
    """
    return functools.partial(model.generate, generation=decoding)


def encode_function(model: Model, embed: str | None = None) -> Callable[..., Array]:
    """(parameters, inputs [B, N, ...]) -> what is read of the encoder, float32.

    Args:
        model: an encoder with a head, or any model for embeddings.
        embed: "mean" for the mean of the encoder's outputs, [B, D]; "tokens" for all of them,
            [B, N, D]; None for what the head gives, [B, C].

    Raises:
        ValueError: `embed` is another word, or None for a model without such a head.
    """
    if embed is None:
        if not model.describes:
            raise ValueError(
                "this model has no head for labels or numbers: give 'mean' or 'tokens'"
            )
        return model.predict
    if embed not in EMBEDDINGS:
        raise ValueError(f"embed={embed!r} must be one of {EMBEDDINGS}")

    def encode(params, inputs):
        encoded = model.encode(params, inputs)
        if embed == "tokens":
            return encoded.astype(jnp.float32)
        return pool(encoded, model.module.input_mask(inputs), "mean")

    return encode


class _Bucketed:
    """Batches of inputs of similar lengths for a model whose parameters are in place.

    Attributes:
        num_truncated: inputs that were too long so far.
    """

    def __init__(
        self, config: ModelConfig, params: Mapping[str, Any], batch_size: int, longest: int
    ):
        self.num_truncated = 0
        self._model = model_for(config)
        self._placement = Placement()
        self._params = self._placement.params(params)
        self._batch_size, self._longest = batch_size, longest
        self._placement.check_rows("Decoding.batch_size", batch_size)

    def _batches(self, inputs: Sequence[np.ndarray]) -> Iterator[tuple[list[int], Array]]:
        """(indices of some inputs, the batch of them)."""
        size = self._batch_size
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            yield indices, self._batch([inputs[index] for index in indices], size)

    def _refuse(self, number: int, tokens: np.ndarray) -> None:
        """Raises FloatingPointError: what the model gives for an input is not finite."""
        leaves = trees.flatten(self._params).items()
        wrong = [path for path, leaf in leaves if not jnp.isfinite(leaf).all()]
        if wrong:
            reason = f"{len(wrong)} parameters are not finite themselves, such as {wrong[0]}"
        elif not np.isfinite(tokens).all():
            reason = "the input holds values that are not finite"
        else:
            reason = f"values leave the range of {jnp.dtype(self._model.config.dtype).name}"
        raise FloatingPointError(
            f"no answer to input {number} (the first is 0): the model's outputs for it are "
            f"NaN or infinite; {reason}"
        )

    def _batch(self, inputs: Sequence[np.ndarray], size: int) -> Array:
        """Some inputs in a batch of a size, cut to the longest bucket and filled up."""
        longest = self._longest
        self.num_truncated += sum(len(tokens) > longest for tokens in inputs)
        length = bucket(max(map(len, inputs)), longest)
        config = self._model.config
        spec = config.input_spec(size, length)
        fill = config.pad_id if np.issubdtype(spec.dtype, np.integer) else 0
        batch = np.full(spec.shape, fill, spec.dtype)
        for row, tokens in zip(batch, inputs, strict=False):
            row[: len(tokens)] = tokens[:length]
        return self._placement.batch({"tokens": batch})["tokens"]


class Encodings(_Bucketed):
    """An encoder ready to answer with its head, or with its outputs.

    Args:
        config: of the model.
        params: its parameters.
        decoding: the size of batches and the longest input.
        embed: see `encode_function`.

    Attributes:
        num_truncated: inputs that were too long so far.

    Raises:
        ValueError: see `encode_function`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        decoding: Decoding = Decoding(),
        embed: str | None = None,
    ):
        super().__init__(config, params, decoding.batch_size, decoding.max_input_length)
        self._embed = embed
        self._encode = jax.jit(encode_function(self._model, embed))

    def __call__(
        self, inputs: Sequence[np.ndarray], first: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the input, its outputs: [C] of a head, [D] a mean, [n, D] of n tokens).

        Args:
            inputs: arrays of tokens, each with its end marker, or of patches.
            first: number of the first of them in a longer list.

        Raises:
            FloatingPointError: an output is not finite; the number of its input is named.
        """
        for indices, batch in self._batches(inputs):
            outputs = np.asarray(self._encode(self._params, batch))
            for index, found in zip(indices, outputs, strict=False):  # the last batch has spares
                real = len(inputs[index]) if self._embed == "tokens" else len(found)
                if not np.isfinite(found[:real]).all():
                    self._refuse(first + index, inputs[index])
                yield index, found[:real]


class Predictor(_Bucketed):
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
        super().__init__(config, params, decoding.batch_size, decoding.max_input_length)
        self._model.check_generation(decoding)
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

        Raises:
            FloatingPointError: a logit is not finite; the number of its input is named.
        """
        for indices, batch in self._batches(inputs):
            numbers = [first + index for index in indices]
            arguments = self._arguments(numbers, self._batch_size)
            found = self._generate(self._params, batch, **arguments)
            # The last batch has spares.
            for index, outputs, scores in zip(indices, *map(np.asarray, found), strict=False):
                if np.isnan(scores).any():
                    self._refuse(first + index, inputs[index])
                yield index, outputs, scores

    def stream(self, tokens: np.ndarray, number: int = 0) -> Iterator[int]:
        """The tokens of an output as they come: what `__call__` gives, up to the end marker.

        Args:
            tokens: the input, as in `candidates`.
            number: of the input in a list, on which its draws depend.

        Raises:
            ValueError: beams, which may yet take back what they have chosen; several outputs.
            FloatingPointError: a logit is not finite.
        """
        begin, grow = self._stepwise
        size = self._placement.mesh.size  # one input, and a spare row for each other device
        batch = self._batch([tokens], size)
        encoded, rows = begin(self._params, batch, **self._arguments([number], size))
        refuse = functools.partial(self._refuse, number, tokens)
        return self._streamed(batch, encoded, rows, grow, refuse)

    def _streamed(self, batch, encoded, rows, grow, refuse) -> Iterator[int]:
        yield from self.decoding.decoder_prefix
        for place in range(len(self.decoding.decoder_prefix) + 1, rows.tokens.shape[1]):
            rows = grow(self._params, batch, encoded, rows, **self._stops)
            if np.isnan(rows.log_probs[0]):
                refuse()
            yield int(rows.tokens[0, place])
            if rows.ended[0]:
                return

    @functools.cached_property
    def _stepwise(self) -> tuple[Callable, Callable]:
        begin, grow = self._model.stepwise(self.decoding)
        return jax.jit(begin), jax.jit(grow, donate_argnums=3)

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
