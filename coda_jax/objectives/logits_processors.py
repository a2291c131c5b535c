"""What options of generation do to the logits of the next token, as transformers defines them.

Each function is pure and works on static shapes, so that it can be traced. `processed` and `warped`
put them together in transformers' order; what is not asked for leaves nothing in the program.

Axis letters: R rows, T places of the tokens so far, V vocabulary.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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


def without_end(logits: Logits, forbidden: Bool[Array, ""] | bool, eos_id: int) -> Logits:
    """The logits [R, V] without the end token, if `forbidden` is True."""
    return jnp.where((jnp.arange(logits.shape[1]) == eos_id) & forbidden, -jnp.inf, logits)


def forced(logits: Logits, here: Bool[Array, ""] | bool, token: int) -> Logits:
    """The logits [R, V] with one token alone, of log-probability 0, if `here` is True."""
    only = jnp.where(jnp.arange(logits.shape[1]) == token, 0.0, -jnp.inf)
    return jnp.where(here, only, logits)


def top_k(logits: Logits, k: int) -> Logits:
    """The k greatest of each row of [R, V], and what equals the least of them; else -inf."""
    return _kept(logits, lambda chosen: chosen.sum(1) >= k)


def top_p(logits: Logits, p: float) -> Logits:
    """The fewest tokens of each row of [R, V] whose probability together reaches p; else -inf.

    The most probable come first; where several equal the least of them, all are left.
    """
    probabilities = jax.nn.softmax(logits)
    least = max(p, jnp.finfo(jnp.float32).tiny)  # one token at least
    return _kept(logits, lambda chosen: jnp.where(chosen, probabilities, 0).sum(1) >= least)


def _kept(logits: Logits, enough: Callable[[Bool[Array, "r v"]], Bool[Array, " r"]]) -> Logits:
    """Leaves the greatest logits that are enough, or all.

    The least of them is searched for bit by bit, which takes 32 passes: a sort takes the time of
    ten times as many.

    Args:
        logits: [R, V].
        enough: whether what is chosen is enough; so it stays if more is chosen.
    """
    bits = lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    limits = jnp.iinfo(jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # the least is at least `low` and at most `high`
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        holds = enough(ordered >= middle[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

    start = (jnp.full(logits.shape[0], limits.min), jnp.full(logits.shape[0], limits.max))
    least, _ = lax.fori_loop(0, 32, halve, start)
    return jnp.where(ordered >= least[:, None], logits, -jnp.inf)


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
    """The processed logits [R, V] as a draw sees them: temperature, top-k, top-p."""
    if options.temperature != 1:
        logits = logits / options.temperature
    if options.top_k:
        logits = top_k(logits, options.top_k)
    if options.top_p < 1:
        logits = top_p(logits, options.top_p)
    return logits
