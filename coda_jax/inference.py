"""Outputs for lists of inputs: batches of equal, bucketed lengths, so that little is compiled.

A batch is filled up with rows of padding, which generation does not wait for; a list that is
shorter than a batch is one of the next power of two.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from coda_jax import checks, processes, trees
from coda_jax.adapters import Adapter, Adapters, Names, checked_names
from coda_jax.data.batches import bucket, cut, rounded_up
from coda_jax.data.examples import input_problem
from coda_jax.data.stop_texts import stop_table
from coda_jax.data.vocabularies import Vocabulary
from coda_jax.models import ModelConfig, family_of, placed
from coda_jax.objectives import Generation, Model, model_for
from coda_jax.objectives.encoding import encode_function
from coda_jax.sharding import Placement


@dataclasses.dataclass(frozen=True)
class Decoding(Generation):
    """How outputs are made, and of which inputs at once.

    Attributes:
        max_input_length: the most tokens of an input, the end marker included, or vectors; None for
            the family's.
        batch_size: the most inputs decoded at once; a multiple of the devices that share them.
    """

    max_input_length: int | None = None
    batch_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        checks.fields(self, max_input_length=checks.Maybe(checks.COUNT), batch_size=checks.COUNT)

    def check_encodes(self, **others: object) -> None:
        """Raises ValueError where something is asked for that only generation reads.

        Args:
            **others: what is asked for beside these options, by name; false where it is not.
        """
        names = [f"Decoding.{name}" for name in self.given_options]
        names += [name for name, given in others.items() if given]
        if names:
            raise ValueError(f"nothing is generated, the encoder answers: no {', '.join(names)}")


def generate_function(model: Model, decoding: Decoding) -> Callable[..., tuple[Array, Array]]:
    """(parameters, inputs [B, N, ...]) -> tokens [B, n, L] and scores [B, n].

    Where tokens are drawn it takes the arguments `seed` and `numbers`, where there are stop texts
    `stops`: see `Seq2Seq.generate`.
    """
    return functools.partial(model.generate, generation=decoding)


class Bucketed:
    """Batches of inputs of similar lengths for a model whose parameters are in place.

    Attributes:
        adapters: one of which each input has for its own; None for a model that is all there is.
        num_inputs: inputs so far.
        num_truncated: those that were too long.
        longest: the longest of them, before it was cut.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        decoding: Decoding,
        placement: Placement | None,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        self.num_inputs = self.num_truncated = self.longest = 0
        self._placement = placement or Placement()
        self._placement.check("Decoding.batch_size", decoding.batch_size, "data")
        self.adapters = None
        if adapters is not None:
            self.adapters = Adapters(config, params, adapters, self._placement)
            config, params = self.adapters.config, self.adapters.frozen
        self._model = model_for(config)
        if self.adapters:
            self._model = self._model.with_own_leaves()
        self._params = placed(config, params, self._placement)
        self._batch_size = decoding.batch_size
        self._limit = decoding.max_input_length or family_of(config).inputs.longest

    def _batches(
        self, inputs: Sequence[np.ndarray], first: int = 0
    ) -> Iterator[tuple[list[int], Array]]:
        """(indices of some inputs, the batch of them); `first` is the number of the first.

        Raises:
            ValueError: an input is none of the model; its number is named.
        """
        size = self._size(len(inputs))
        for number, values in enumerate(inputs, start=first):
            self._check(values, number)
        processes.check_same("the inputs", lambda: inputs)
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            yield indices, self._batch([inputs[index] for index in indices], size)

    def _params_of(self, names: Iterable[str | None], size: int) -> Mapping[str, Any]:
        """The parameters for a batch of a size, with the leaves of the adapter of each row."""
        if self.adapters is None:
            return self._params
        return trees.merge(self._params, self.adapters.of_rows([*names], size))

    def _size(self, count: int) -> int:
        """The rows of each batch of so many inputs."""
        shared_by = self._placement.mesh.shape["data"]
        return min(self._batch_size, shared_by * rounded_up(-(-count // shared_by), 1))

    def cuts(self) -> list[str]:
        """Sentences on what was cut so far."""
        if not self.num_truncated:
            return []
        return [
            f"{self.num_truncated:,} of {self.num_inputs:,} inputs were longer than "
            f"{self._limit:,} {family_of(self._model.config).inputs.unit} and were cut: "
            f"--gin.Decoding.max_input_length={self.longest} keeps all"
        ]

    def _check(self, values: np.ndarray, number: int) -> None:
        if (why := input_problem(values, self._model.expects)) is not None:
            raise ValueError(f"input {number} (the first is 0): {why}")

    def _refuse(self, number: int) -> None:
        """Raises FloatingPointError: what the model gives for an input is not finite."""
        leaves = trees.flatten(self._params).items()
        wrong = [path for path, leaf in leaves if not jnp.isfinite(leaf).all()]
        if wrong:
            reason = f"{len(wrong)} parameters are not finite themselves, such as {wrong[0]}"
        else:
            reason = f"values leave the range of {jnp.dtype(self._model.config.dtype).name}"
        raise FloatingPointError(
            f"no answer to input {number} (the first is 0): the model's outputs for it are "
            f"NaN or infinite; {reason}"
        )

    def _batch(self, inputs: Sequence[np.ndarray], size: int) -> Array:
        """Some inputs in a batch of a size, cut to the longest bucket and filled up."""
        self.num_inputs += len(inputs)
        self.num_truncated += sum(len(values) > self._limit for values in inputs)
        self.longest = max(self.longest, *map(len, inputs))
        length = bucket(max(map(len, inputs)), self._limit)
        config = self._model.config
        spec = config.input_spec(size, length)
        fill = config.pad_id if np.issubdtype(spec.dtype, np.integer) else 0
        batch = np.full(spec.shape, fill, spec.dtype)
        for row, values in zip(batch, inputs, strict=False):
            kept = cut(values, length, config.eos_id)
            row[: len(kept)] = kept
        return self._placement.batch({"tokens": batch})["tokens"]


class Encodings(Bucketed):
    """An encoder ready to answer with its head, or with its outputs.

    Args:
        config: of the model.
        params: its parameters.
        decoding: the size of batches and the longest input.
        embed: see `encode_function`.
        placement: the devices; None for all, which share the rows of a batch.
        adapters: as of `Predictor`.

    Attributes:
        adapters: likewise.
        num_inputs, num_truncated, longest: of the inputs so far: how many, how many were too long,
            and the longest.

    Raises:
        ValueError: see `encode_function`; or devices cannot share the model or a batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        decoding: Decoding = Decoding(),
        embed: str | None = None,
        placement: Placement | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        super().__init__(config, params, decoding, placement, adapters)
        self._embed = embed
        self._encode = jax.jit(encode_function(self._model, embed))

    def __call__(
        self, inputs: Sequence[np.ndarray], first: int = 0, adapters: Names = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the input, its outputs: [C] of a head, [D] a mean, [n, D] of n tokens).

        Args:
            inputs: arrays of tokens, each with its end marker, or of patches.
            first: number of the first of them in a longer list.
            adapters: as of `Predictor.candidates`.

        Raises:
            FloatingPointError: an output is not finite; the number of its input is named.
        """
        names = checked_names(self.adapters, adapters, len(inputs), first)
        for indices, batch in self._batches(inputs, first):
            params = self._params_of((names[index] for index in indices), len(batch))
            with self._placement.divided():
                outputs = processes.fetch(self._encode(params, batch))
            for index, found in zip(indices, outputs, strict=False):  # the last batch has spares
                real = len(inputs[index]) if self._embed == "tokens" else len(found)
                if not np.isfinite(found[:real]).all():
                    self._refuse(first + index)
                yield index, found[:real]


class Predictor(Bucketed):
    """A model ready to answer; it compiles one program per bucket of input lengths and batch size.

    Args:
        config: of the model.
        params: its parameters.
        decoding: how it answers.
        vocabulary: of its outputs; needed where there are stop texts.
        placement: the devices; None for all, which share the rows of a batch.
        adapters: {name: adapter} where each input has one of several for its own: see
            `Adapters`, which takes config and parameters of their base.

    Attributes:
        decoding: the same, with no option of generation left open.
        adapters: those of the inputs, to which others may be added between calls; else None.
        num_inputs, num_truncated, longest: of the inputs so far: how many, how many were too long,
            and the longest.
        num_cut: outputs so far, the best of each input, that reached the limit without an end.

    Raises:
        ValueError: options contradict each other, a vocabulary is missing, or devices cannot share
            the model or a batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        decoding: Decoding = Decoding(),
        vocabulary: Vocabulary | None = None,
        placement: Placement | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        self.decoding = decoding = decoding.resolved()
        super().__init__(config, params, decoding, placement, adapters)
        self._model.check_generation(decoding)
        self.num_cut = 0
        self._generate = jax.jit(generate_function(self._model, decoding))
        self._stops = {}
        if decoding.stop_strings:
            table = stops_of(decoding, vocabulary, config)
            self._stops["stops"] = jax.device_put(table, self._placement.replicated)

    def cuts(self) -> list[str]:
        """Sentences on what was cut so far, inputs and outputs."""
        if not self.num_cut:
            return super().cuts()
        limit = self.decoding.max_decode_length
        return [
            *super().cuts(),
            f"{self.num_cut:,} of {self.num_inputs:,} outputs were cut at {limit:,} tokens: "
            f"--gin.Decoding.max_decode_length={2 * limit} leaves them more",
        ]

    @property
    def num_programs(self) -> int:
        """How many programs have been compiled, but for those of `stream`."""
        return self._generate._cache_size()

    def __call__(
        self, inputs: Sequence[np.ndarray], first: int = 0, adapters: Names = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The best output of each input: see `candidates`.

        Yields:
            (index of the input, its output tokens [L], padding after the end marker).
        """
        for index, tokens, _ in self.candidates(inputs, first, adapters):
            yield index, tokens[0]

    def candidates(
        self, inputs: Sequence[np.ndarray], first: int = 0, adapters: Names = None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The outputs of each input, in batches of similar lengths.

        Args:
            inputs: arrays of tokens, each with its end marker, or of patches. What is longer than
                `max_input_length` is cut and counted in `num_truncated`.
            first: number of the first of them in a longer list. What is drawn for an input depends
                on its number, and not on the other inputs.
            adapters: the name of each input's adapter, where there are several.

        Yields:
            (index of the input, its output tokens [n, L], the best first, padding after the end
            marker, and their log-probabilities [n]: sums over tokens, the end marker's included and
            a prefix's not, without a length penalty. A CTC head's is that of the best alignment or,
            with beams, of the transcript).

        Raises:
            FloatingPointError: a logit is not finite; the number of its input is named.
        """
        names = checked_names(self.adapters, adapters, len(inputs), first)
        for indices, batch in self._batches(inputs, first):
            numbers = [first + index for index in indices]
            params = self._params_of((names[index] for index in indices), len(batch))
            arguments = self._arguments(numbers, len(batch))
            with self._placement.divided():
                found = self._generate(params, batch, **arguments)
            tokens, scores = (x[: len(indices)] for x in processes.fetch(found))  # without spares
            scores = self._model.log_probs(tokens, scores, self.decoding, **self._stops)
            self.num_cut += int(self._model.is_cut(tokens[:, 0], self.decoding).sum())
            for index, outputs, log_probs in zip(indices, tokens, scores, strict=True):
                if np.isnan(log_probs).any():
                    self._refuse(first + index)
                yield index, outputs, log_probs

    def stream(
        self, tokens: np.ndarray, number: int = 0, adapter: str | None = None
    ) -> Iterator[int]:
        """The tokens of an output as they come: what `__call__` gives, up to the end marker.

        Args:
            tokens: the input, as in `candidates`.
            number: of the input in a list, on which its draws depend.
            adapter: the name of its adapter, where there are several.

        Raises:
            ValueError: beams, which may yet take back what they have chosen; several outputs.
            FloatingPointError: a logit is not finite.
        """
        self._check(tokens, number)
        names = checked_names(self.adapters, adapter and [adapter], 1, number)
        begin, grow = self._stepwise
        size = self._placement.mesh.shape["data"]  # one input, and spare rows for other devices
        batch, params = self._batch([tokens], size), self._params_of(names, size)
        with self._placement.divided():
            encoded, rows = begin(params, batch, **self._arguments([number], size))
        refuse = functools.partial(self._refuse, number)
        return self._streamed(params, batch, encoded, rows, grow, refuse)

    def _streamed(self, params, batch, encoded, rows, grow, refuse) -> Iterator[int]:
        yield from self.decoding.decoder_prefix
        for place in range(len(self.decoding.decoder_prefix) + 1, rows.tokens.shape[1]):
            with self._placement.divided():
                rows = grow(params, batch, encoded, rows, **self._stops)
            if np.isnan(rows.log_probs[0]):
                refuse()
            yield int(rows.tokens[0, place])
            if rows.ended[0]:
                return
        self.num_cut += 1

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
