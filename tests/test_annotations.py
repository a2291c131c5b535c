"""The shapes and dtypes in the annotations of public functions hold; wrong ones are caught."""

from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
import jax.numpy as jnp
from jaxtyping import TypeCheckError, jaxtyped
import pytest

from coda_jax import conformer, ctc, layers, routing, soft_topk, speech

SCORES = jnp.arange(12.0).reshape(2, 6)
MASK = jnp.ones((2, 6), bool)
HEADS = jnp.ones((2, 6, 3, 4))

# Function, good arguments, and for some argument a bad value.
CASES = [
    (soft_topk, {"scores": SCORES, "k": 2, "mask": MASK}, {"scores": jnp.arange(6)}),
    (soft_topk, {"scores": SCORES, "k": jnp.array([1, 2])}, {"mask": MASK[:, :5]}),
    (
        soft_topk,
        {"scores": SCORES, "k": jnp.ones((2, 1), int), "segment_ids": MASK.astype(int)},
        {"segment_ids": MASK},
    ),
    (
        routing.select,
        {"scores": SCORES, "k": jnp.ones((2, 1), int), "num_slots": 2, "mask": MASK},
        {"mask": MASK[:1]},
    ),
    (routing.num_selected, {"length": jnp.array([3, 4]), "reduction": 2.0}, {"length": SCORES}),
    (
        layers.attend,
        {"query": HEADS, "key": HEADS, "value": HEADS, "bias": None, "mask": None},
        {"value": HEADS[:, :5]},
    ),
    (
        conformer.causal_convolution,
        {"x": HEADS[..., 0], "kernel": jnp.ones((5, 3)), "segment_ids": MASK.astype(int)},
        {"kernel": jnp.ones((5, 4))},
    ),
    (speech.join_frames, {"features": HEADS[..., 0], "feature_mask": MASK}, {"features": SCORES}),
    (
        ctc.ctc_loss,
        {
            "logits": HEADS[..., 0],
            "mask": MASK,
            "targets": jnp.ones((2, 4), int),
            "target_mask": jnp.ones((2, 4), bool),
        },
        {"target_mask": MASK},
    ),
    (ctc.ctc_greedy, {"logits": HEADS[..., 0], "mask": MASK}, {"mask": SCORES}),
]


@pytest.mark.parametrize(("function", "arguments", "bad"), CASES)
def test_good_arguments_pass_and_bad_ones_do_not(function, arguments, bad):
    checked = jaxtyped(typechecker=beartype)(function)
    checked(**arguments)
    with pytest.raises((TypeCheckError, BeartypeCallHintViolation)):
        checked(**{**arguments, **bad})
