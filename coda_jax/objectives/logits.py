"""What options of generation do to the logits of the next token, as transformers defines them.

Each function is pure and works on static shapes, so that it can be traced. `processed` and `warped`
put them together in transformers' order; what is not asked for leaves nothing in the program.

Axis letters: R rows, T places of the tokens so far, V vocabulary.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coda_jax.objectives.generation import Generation

Logits = Float[Array, "r v"]
Tokens = Int[Array, "r t"]


def repetition_penalty(
    logits: Logits, tokens: Tokens, length: Int[Array, ""] | int, penalty: float
) -> Logits:
    """Divides what is above 0 by the penalty and multiplies what is below, of the tokens so far.

    Args:
        logits: [R, V].
        tokens: [R, T] all that the decoder has seen, its start token first.
        length: how many places of them are in use.
        penalty: above 1 to discourage.
    """
    seen = _marked(logits, tokens, jnp.arange(tokens.shape[1]) < length)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def no_repeat_ngrams(
    logits: Logits, tokens: Tokens, length: Int[Array, ""] | int, size: int
) -> Logits:
    """Forbids what would make `size` tokens in a row stand there twice.

    Args:
        logits: [R, V].
        tokens: [R, T] all that the decoder has seen, its start token first.
        length: how many places of them are in use.
        size: of the n-grams, at least 1.
    """
    count = tokens.shape[1] - size + 1  # of the n-grams, each by the place of its first token
    if count < 1:
        return logits
    last = lax.dynamic_slice_in_dim(tokens, length - size + 1, size - 1, axis=1)
    repeated = jnp.arange(count) + size <= length
    for place in range(size - 1):
        repeated = repeated & (tokens[:, place : place + count] == last[:, place, None])
    banned = _marked(logits, tokens[:, size - 1 :], repeated)
    return jnp.where(banned, -jnp.inf, logits)


def _marked(logits: Logits, tokens: Tokens, chosen: Array) -> Array:
    """[R, V], True for the tokens at the chosen places, [R, T]."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    tokens = jnp.where(chosen, tokens, logits.shape[1])  # past the vocabulary, where it is dropped
    return jnp.zeros(logits.shape, bool).at[rows, tokens].set(True, mode="drop")


def without_end(logits: Logits, forbidden: Array | bool, eos_id: int) -> Logits:
    """Forbids the end token where `forbidden` is True."""
    return jnp.where((jnp.arange(logits.shape[1]) == eos_id) & forbidden, -jnp.inf, logits)


def forced(logits: Logits, here: Array | bool, token: int) -> Logits:
    """Leaves only one token, of log-probability 0, where `here` is True."""
    only = jnp.where(jnp.arange(logits.shape[1]) == token, 0.0, -jnp.inf)
    return jnp.where(here, only, logits)


def top_k(logits: Logits, k: int) -> Logits:
    """Leaves the k greatest, and what equals the least of them."""
    least = lax.top_k(logits, min(k, logits.shape[1]))[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def top_p(logits: Logits, p: float) -> Logits:
    """Leaves the fewest tokens, the most probable first, whose probability together reaches p."""
    rows, places = jnp.arange(logits.shape[0])[:, None], jnp.arange(logits.shape[1])
    ascending, order = lax.sort_key_val(logits, jnp.broadcast_to(places, logits.shape))
    less_probable = jnp.cumsum(jax.nn.softmax(ascending), axis=1)  # the token itself included
    removed = (less_probable <= 1 - p) & (places < logits.shape[1] - 1)
    kept = jnp.where(removed, -jnp.inf, ascending)
    return jnp.zeros_like(logits).at[rows, order].set(kept)


def processed(
    logits: Logits,
    tokens: Tokens,
    length: Int[Array, ""],
    options: Generation,
    num_given: Int[Array, ""] | int,
    eos_id: int,
) -> Logits:
    """The logits as a search sees them, greedy or with beams.

    Args:
        logits: [R, V] of the next token; a beam search gives log-probabilities.
        tokens: [R, T] all that the decoder has seen, its start token first.
        length: how many places of them are in use.
        options: resolved.
        num_given: how many of them were given, the start token among them.
        eos_id: the end token.
    """
    if options.repetition_penalty != 1:
        logits = repetition_penalty(logits, tokens, length, options.repetition_penalty)
    if options.no_repeat_ngram_size:
        logits = no_repeat_ngrams(logits, tokens, length, options.no_repeat_ngram_size)
    if options.min_new_tokens:
        too_short = length - num_given < options.min_new_tokens
        logits = without_end(logits, too_short, eos_id)
    if options.forced_bos_token_id is not None:
        logits = forced(logits, length == 1, options.forced_bos_token_id)
    return logits


def warped(logits: Logits, options: Generation) -> Logits:
    """The processed logits as a draw sees them: temperature, top-k, top-p."""
    if options.temperature != 1:
        logits = logits / options.temperature
    if options.top_k:
        logits = top_k(logits, options.top_k)
    if options.top_p < 1:
        logits = top_p(logits, options.top_p)
    return logits
