"""Connectionist temporal classification: the loss and greedy decoding, as pure functions.

Axis letters: B batch, N frames, T target tokens, V vocabulary.
Reference: Graves et al. 2006, Connectionist Temporal Classification.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import optax

from coda_jax.routing import kept_first, pick


def ctc_loss(
    logits: Float[Array, "b n v"],
    mask: Bool[Array, "b n"],
    targets: Int[Array, "b t"],
    target_mask: Bool[Array, "b t"],
    blank_id: int = 0,
) -> Float[Array, "b"]:
    """-log of the probability of all alignments of the targets with the frames.

    Args:
        logits: [B, N, V].
        mask: [B, N], False for padding, which stands at the end.
        targets: [B, T].
        target_mask: [B, T], False for padding, which stands at the end.
        blank_id: the token that means no token.

    Returns:
        [B]; 0 without frames and targets, infinite where no alignment is possible: there must be a
        frame for each target and one between two equal ones.
    """
    losses = optax.ctc_loss(
        logits.astype(jnp.float32),
        (~mask).astype(jnp.float32),
        targets,
        (~target_mask).astype(jnp.float32),
        blank_id=blank_id,
    )
    repeats = (targets[:, 1:] == targets[:, :-1]) & target_mask[:, 1:]
    needed = target_mask.sum(-1) + repeats.sum(-1)
    return jnp.where(needed <= mask.sum(-1), losses, jnp.inf)


def ctc_greedy(
    logits: Float[Array, "b n v"], mask: Bool[Array, "b n"], blank_id: int = 0
) -> Int[Array, "b n"]:
    """The tokens of the most probable alignment: equal neighbours become one, blanks go.

    Args:
        logits: [B, N, V].
        mask: [B, N], False for padding, which stands at the end.
        blank_id: the token that means no token.

    Returns:
        [B, N] int32, the tokens first, then `blank_id`, which is never one of them.
    """
    best = logits.argmax(-1).astype(jnp.int32)
    previous = jnp.pad(best, ((0, 0), (1, 0)), constant_values=blank_id)[:, :-1]
    starts = mask & (best != blank_id) & (best != previous)
    there = jnp.arange(best.shape[1]) < starts.sum(-1, keepdims=True)
    return jnp.where(there, pick(best, kept_first(starts, best.shape[1])), blank_id)
