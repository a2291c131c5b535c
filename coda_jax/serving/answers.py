"""A model's outputs for a few inputs, as texts, labels and numbers that JSON can hold."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from coda_jax.data.batches import buckets
from coda_jax.data.stop_texts import cut
from coda_jax.data.vocabularies import Vocabulary
from coda_jax.inference import Decoding, Encodings, Predictor
from coda_jax.models import ModelConfig, family_of
from coda_jax.objectives import model_for
from coda_jax.objectives.beams import NO_OUTPUT

_NUMBERS = 2**32  # of inputs: draws depend on a uint32


def texts_of(decoding: Decoding, vocabulary: Vocabulary) -> Callable[[list[int]], str]:
    """(tokens of an output) -> its text, up to its first stop text."""
    if not decoding.stop_strings:
        return vocabulary.decode
    start = len(vocabulary.decode(decoding.decoder_prefix))
    return lambda tokens: cut(vocabulary.decode(tokens), decoding.stop_strings, start)


def outputs_of(
    text: Callable[[list[int]], str], tokens: np.ndarray, scores: np.ndarray
) -> list[dict[str, Any]]:
    """Each output of an input, the best first, as {"text", "score"}.

    Args:
        text: as of `texts_of`.
        tokens: [n, L].
        scores: [n].
    """
    return [
        {"text": text(found.tolist()), "score": float(score)}
        for found, score in zip(tokens, scores, strict=True)
        if score > NO_OUTPUT
    ]


class Answers:
    """What answers inputs, all of which are whole: none is longer than the longest.

    Args:
        config: of the model.
        decoding: how it answers, the longest input said.
        outputs: (inputs, number of the first, names of their adapters) -> (index of an input, its
            outputs) of each: a `Predictor`'s candidates, or `Encodings`.
        say: (outputs of an input) -> the answer.
        generates: whether outputs are made token by token.

    Attributes:
        batch_size: the most inputs that share a batch.
        longest: the longest input.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoding: Decoding,
        outputs: Callable[..., Iterator[tuple]],
        say: Callable[..., dict[str, Any]],
        generates: bool,
    ):
        self.batch_size, self.longest = decoding.batch_size, decoding.max_input_length
        self._config, self._outputs, self._say = config, outputs, say
        self._generates, self._done = generates, 0

    def __call__(
        self, inputs: Sequence[np.ndarray], names: Sequence[str] | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index of an input, its answer) of each; draws are new ones for each input.

        Args:
            inputs: at most a batch of them.
            names: of their adapters; None where there are none.

        Raises:
            FloatingPointError: an output is not finite.
        """
        first, self._done = self._done, (self._done + len(inputs)) % (_NUMBERS - self.batch_size)
        for index, *found in self._outputs(inputs, first, names):
            yield index, self._say(*found)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(inputs, length) of lists that need all programs, the smallest first."""
        counts = [1 << power for power in range(self.batch_size.bit_length())]
        counts = sorted({*counts, self.batch_size})
        return [(count, length) for length in buckets(self.longest) for count in counts]

    def warm_up(self, count: int, length: int, names: Sequence[str] | None) -> None:
        """Compiles the program for a list of inputs, where there is none yet."""
        inputs = [self._made_up(length)] * count
        for _ in self._outputs(inputs, 0, names and [names[0]] * count):
            pass

    def _made_up(self, length: int) -> np.ndarray:
        """An input that is long; of padding where that is possible, for which no step is done."""
        spec = self._config.input_spec(1, length)
        if self._generates and np.issubdtype(spec.dtype, np.integer):
            return np.full(length, self._config.pad_id, spec.dtype)
        rng = np.random.default_rng(0)
        return family_of(self._config).inputs.random(self._config, rng, 1, length)[0]


def generated(predictor: Predictor, config: ModelConfig, vocabulary: Vocabulary) -> Answers:
    """Answers as texts: "prediction", the best, and its "score", see `Predictor.candidates`.

    Of several outputs "predictions" lists all, the best first, as {"text", "score"}.
    """
    decoding = predictor.decoding
    text = texts_of(decoding, vocabulary)

    def say(tokens, scores):
        found = outputs_of(text, tokens, scores)
        best = {"prediction": found[0]["text"], "score": found[0]["score"]}
        return {**best, "predictions": found} if decoding.num_return_sequences > 1 else best

    return Answers(config, decoding, predictor.candidates, say, generates=True)


def described(encodings: Encodings, config: ModelConfig, decoding: Decoding) -> Answers:
    """Answers as labels or numbers: "prediction", and of labels the "scores" of all."""
    return Answers(config, decoding, encodings, model_for(config).describe, generates=False)


def embedded(encodings: Encodings, config: ModelConfig, decoding: Decoding) -> Answers:
    """Answers as the encoder's outputs: "embedding", a vector or a list of them."""

    def say(outputs):
        return {"embedding": outputs.tolist()}

    return Answers(config, decoding, encodings, say, generates=False)
