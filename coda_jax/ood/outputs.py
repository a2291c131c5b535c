"""What a model makes of inputs: the logits of the labels, features, and scores of its routing.

Axis letters: B batch, N input tokens, C labels, D embedding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
from jaxtyping import Float
import numpy as np

from coda_jax import processes
from coda_jax.inference import Bucketed, Decoding
from coda_jax.models import ModelConfig
from coda_jax.nn.tokens import pool
from coda_jax.objectives import Model
from coda_jax.objectives.prefix_tree import prefix_tree
from coda_jax.ood.routing import routing_scores
from coda_jax.sharding import Placement


class Made(NamedTuple):
    """What a model makes of an input, or of B inputs with an axis of these in front.

    Attributes:
        logits: [C] of the labels.
        features: {name: [D]}.
        routing: {name: score} of its routing; see `routing_scores`.
    """

    logits: Float[Array, "*b c"]
    features: dict[str, Float[Array, "*b d"]]
    routing: dict[str, Float[Array, "*b"]]


class Outputs(Bucketed):
    """A model ready to score labels; it compiles one program per bucket of input lengths.

    Of a model with a head for labels the logits are the head's, of one with a decoder the
    log-probabilities of the labels' whole texts.

    Args:
        config: of the model.
        params: its parameters.
        decoding: the size of batches and the longest input.
        targets: tokens of each label, end markers included; none for a model with a head.
        placement: the devices; None for all, which share the rows of a batch.

    Raises:
        ValueError: a model that has neither; or devices cannot share the model or a batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        decoding: Decoding,
        targets: Sequence[Sequence[int]] = (),
        placement: Placement | None = None,
    ):
        super().__init__(config, params, decoding, placement)
        has_head = bool(getattr(config, "labels", ()))
        if has_head == bool(targets) or not (has_head or config.num_decoder_layers):
            raise ValueError(
                "labels are those of a model's head, or texts that its decoder writes; this model "
                f"has {'a head' if has_head else 'no head'}, {config.num_decoder_layers} decoder "
                f"layers, and {len(targets)} texts are given"
            )
        made = of_head(self._model) if has_head else of_decoder(self._model, targets)
        self._made = self._featured = jax.jit(made)
        if targets:  # features need no labels
            self._featured = jax.jit(of_decoder(self._model, [[config.eos_id]]))

    def __call__(self, inputs: Sequence[np.ndarray], first: int = 0) -> Iterator[tuple[int, Made]]:
        """(index of the input, what is made of it, as numpy arrays).

        Args:
            inputs: arrays of tokens, each with its end marker, or of patches.
            first: number of the first of them in a longer list.

        Raises:
            FloatingPointError: an output is not finite; the number of its input is named.
        """
        return self._each(self._made, inputs, first)

    def features(
        self, inputs: Sequence[np.ndarray], first: int = 0
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(index of the input, its features); arguments and errors are those of a call."""
        return ((i, made.features) for i, made in self._each(self._featured, inputs, first))

    def _each(self, program, inputs, first):
        for indices, batch in self._batches(inputs, first):
            with self._placement.divided():
                made = processes.fetch(program(self._params, batch))
            for row, index in enumerate(indices):
                found = jax.tree.map(lambda values, row=row: values[row], made)
                if not all(np.isfinite(values).all() for values in jax.tree.leaves(found)):
                    self._refuse(first + index)
                yield index, found


def of_head(model: Model) -> Callable[..., Made]:
    """(parameters, inputs) -> what the head gives, and the mean of the encoder's outputs."""

    def made(params, inputs):
        encoded, selections = model.encode_selecting(params, inputs)
        mean = pool(encoded, model.module.input_mask(inputs), "mean")
        logits = model.read(params, encoded, inputs)
        return Made(logits, {"encoder": mean}, routing_scores(selections))

    return made


def of_decoder(model: Model, targets: Sequence[Sequence[int]]) -> Callable[..., Made]:
    """(parameters, inputs) -> log-probabilities of the targets, features of both stacks."""
    tree = prefix_tree(targets, model.config.decoder_start_id)

    def made(params, inputs):
        encoded, selections = model.encode_selecting(params, inputs)
        scored = model.score_targets(params, inputs, tree, encoded)
        features = {"encoder": scored.encoder, "decoder": scored.decoder}
        return Made(scored.log_probs, features, routing_scores(selections))

    return made
