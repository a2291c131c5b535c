"""What is read of an encoder: its outputs, their mean, or what a head gives.

Axis letters: B batch, N input tokens, C channels of an input or classes, D embedding.
"""

from collections.abc import Callable

from jax import Array
import jax.numpy as jnp

from coda_jax.nn.tokens import pool
from coda_jax.objectives.base import Model

EMBEDDINGS = ("mean", "tokens")


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
