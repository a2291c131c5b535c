"""Greedy and beam search over a cached decoder.

The encoder runs once. Each step then feeds one token per beam to the decoder and reads the keys and
values of all earlier ones from a cache of fixed size, so that a step always costs the same. Call
these functions under `jax.jit`, with the lengths and numbers of beams static: outside of it, making
the cache costs a decoder pass over all positions whose result nobody reads.

Axis letters: B batch, N input tokens, C channels of an input, L output tokens
(`max_decode_length`), V vocabulary, M beams.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.nn.tokens import take

Cache = Any
Step = Callable[[Cache, Int[Array, " rows"]], tuple[Float[Array, "rows v"], Cache]]

# The log-probability of what must not be chosen, as in T5X: finite, so that no `inf - inf` arises.
_IMPOSSIBLE = -1e7


def greedy(
    model: nn.Module,
    params: Any,
    encoder_input_tokens: Int[Array, "b n"] | Float[Array, "b n c"],
    *,
    max_decode_length: int,
    eos_id: int = 1,
) -> tuple[Int[Array, "b l"], Float[Array, " b"]]:
    """The most probable token at each step, until every row has ended.

    Args:
        model: the network.
        params: its parameters.
        encoder_input_tokens: as the model takes them, [B, N] tokens with 0 for padding.
        max_decode_length: L, at least 1.
        eos_id: the token that ends a row.

    Returns:
        tokens [B, L] int32, the end token included and 0 after it; and the log-probabilities [B]
        float32 of the tokens up to there.

    Raises:
        ValueError: max_decode_length below 1.
    """
    _check(max_decode_length=max_decode_length)
    batch = encoder_input_tokens.shape[0]
    step, cache = _start(model, params, encoder_input_tokens, batch, max_decode_length)

    def unfinished(state):
        index, _, _, _, ended, _ = state
        return (index < max_decode_length) & ~ended.all()

    def body(state):
        index, previous, tokens, total, ended, cache = state
        log_probs, cache = step(cache, previous)
        token = jnp.where(ended, 0, log_probs.argmax(-1).astype(jnp.int32))
        total += jnp.where(ended, 0.0, log_probs.max(-1))
        tokens = lax.dynamic_update_slice(tokens, token[:, None], (0, index))
        return index + 1, token, tokens, total, ended | (token == eos_id), cache

    start = (
        jnp.int32(0),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, max_decode_length), jnp.int32),
        jnp.zeros(batch, jnp.float32),
        jnp.zeros(batch, bool),
        cache,
    )
    _, _, tokens, total, _, _ = lax.while_loop(unfinished, body, start)
    return tokens, total


class _Beams(NamedTuple):
    """The state of a beam search; in each row the best beam comes first.

    Attributes:
        index: how many tokens the live beams have.
        live: [B, M, L] tokens of the beams that go on.
        live_log_probs: [B, M].
        finished: [B, M, L] tokens of the best beams that ended.
        scores: [B, M] their log-probabilities with the length penalty.
        occupied: [B, M], False where `finished` has no beam yet.
        cache: of the live beams.
    """

    index: Int[Array, ""]
    live: Int[Array, "b m l"]
    live_log_probs: Float[Array, "b m"]
    finished: Int[Array, "b m l"]
    scores: Float[Array, "b m"]
    occupied: Bool[Array, "b m"]
    cache: Cache


def beam_search(
    model: nn.Module,
    params: Any,
    encoder_input_tokens: Int[Array, "b n"] | Float[Array, "b n c"],
    *,
    max_decode_length: int,
    num_beams: int = 4,
    alpha: float = 0.6,
    eos_id: int = 1,
) -> tuple[Int[Array, "b m l"], Float[Array, "b m"]]:
    """The M best outputs found, by log p / ((5 + length) / 6)^alpha, the end token counted.

    T5X's search: in each step the 2M best continuations of the live beams are looked at; those that
    end compete with the finished beams, the M best of the others live on. It stops when no live
    beam can displace a finished one in any row. A row in which no beam ended returns its live beams
    with their log-probabilities, without the length penalty. Slots for which there are fewer than M
    different outputs score below -1e6.

    Args:
        model: the network.
        params: its parameters.
        encoder_input_tokens: as the model takes them, [B, N] tokens with 0 for padding.
        max_decode_length: L, at least 1.
        num_beams: M, at least 1.
        alpha: strength of the length penalty; 0 for none, more favours longer outputs.
        eos_id: the token that ends a beam.

    Returns:
        tokens [B, M, L] int32, best first, the end token included and 0 after it; scores [B, M]
        float32.

    Raises:
        ValueError: max_decode_length or num_beams below 1.
    """
    _check(max_decode_length=max_decode_length, num_beams=num_beams)
    rows = encoder_input_tokens.shape[0] * num_beams
    step, cache = _start(model, params, encoder_input_tokens, rows, max_decode_length)
    # No live beam can score better than with its present log-probability at the greatest length.
    greatest_penalty = _length_penalty(max_decode_length + 1, alpha)

    def unfinished(beams):
        best_live = beams.live_log_probs[:, :1]
        worst_finished = jnp.where(beams.occupied, beams.scores[:, -1:], _IMPOSSIBLE)
        can_improve = jnp.any(worst_finished <= best_live / greatest_penalty)
        any_live = jnp.any(best_live >= _IMPOSSIBLE)
        return (beams.index < max_decode_length) & can_improve & any_live

    start = _first_beams(cache, encoder_input_tokens.shape[0], num_beams, max_decode_length)
    beams = lax.while_loop(unfinished, lambda beams: _grown(beams, step, alpha, eos_id), start)
    any_finished = beams.occupied.any(axis=1, keepdims=True)
    tokens = jnp.where(any_finished[..., None], beams.finished, beams.live)
    return tokens, jnp.where(any_finished, beams.scores, beams.live_log_probs)


def _grown(beams: _Beams, step: Step, alpha: float, eos_id: int) -> _Beams:
    """The beams after one more token."""
    batch, num_beams, _ = beams.live.shape
    index = beams.index
    last = lax.dynamic_index_in_dim(beams.live, index - 1, axis=2, keepdims=False)
    previous = jnp.where(index > 0, last, 0).reshape(-1)
    log_probs, cache = step(beams.cache, previous)
    log_probs = log_probs.reshape(batch, num_beams, -1) + beams.live_log_probs[..., None]
    vocab_size = log_probs.shape[-1]
    # Twice as many as live on: if M of them end, M are left.
    log_probs, chosen = lax.top_k(log_probs.reshape(batch, -1), 2 * num_beams)
    parents, token = chosen // vocab_size, chosen % vocab_size
    tokens = lax.dynamic_update_slice(take(beams.live, parents), token[..., None], (0, 0, index))
    ended = token == eos_id

    live_log_probs, rank = lax.top_k(log_probs + ended * _IMPOSSIBLE, num_beams)
    cache = _reorder(cache, take(parents, rank))

    scores = log_probs / _length_penalty(index + 1, alpha) + ~ended * _IMPOSSIBLE
    scores, best = lax.top_k(jnp.concatenate([beams.scores, scores], axis=1), num_beams)
    return _Beams(
        index=index + 1,
        live=take(tokens, rank),
        live_log_probs=live_log_probs,
        finished=take(jnp.concatenate([beams.finished, tokens], axis=1), best),
        scores=scores,
        occupied=take(jnp.concatenate([beams.occupied, ended], axis=1), best),
        cache=cache,
    )


def _first_beams(cache: Cache, batch: int, num_beams: int, max_decode_length: int) -> _Beams:
    """The beams before the first token."""
    no_tokens = jnp.zeros((batch, num_beams, max_decode_length), jnp.int32)
    no_scores = jnp.full((batch, num_beams), _IMPOSSIBLE, jnp.float32)
    return _Beams(
        index=jnp.int32(0),
        live=no_tokens,
        live_log_probs=no_scores.at[:, 0].set(0.0),  # all beams are equal: only one may go on
        finished=no_tokens,
        scores=no_scores,
        occupied=jnp.zeros((batch, num_beams), bool),
        cache=cache,
    )


def _check(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _length_penalty(length: int | Int[Array, ""], alpha: float) -> Float[Array, ""]:
    return jnp.float32((5 + length) / 6) ** alpha


def _start(
    model: nn.Module, params: Any, encoder_input_tokens, rows: int, length: int
) -> tuple[Step, Cache]:
    """Encodes the inputs.

    Returns:
        The step, (cache, previous token of each row, 0 at the start) -> (log-probabilities of the
        next [rows, V], cache); and the empty cache. `rows` is a multiple of the batch: the beams of
        an example are neighbours and share the keys and values of its encoding.
    """
    encoded = model.apply(
        {"params": params}, encoder_input_tokens, enable_dropout=False, method="encode"
    )

    def decode(variables, tokens, **kwargs):
        return model.apply(
            {"params": params, **variables},
            encoded,
            encoder_input_tokens,
            tokens,
            tokens,
            enable_dropout=False,
            decode=True,
            method="decode",
            mutable=["cache"],
            **kwargs,
        )

    def step(cache, previous):
        logits, variables = decode({"cache": cache}, previous[:, None])
        return jax.nn.log_softmax(logits[:, 0]), variables["cache"]

    _, variables = decode({}, jnp.ones((rows, length), jnp.int32), cache_encoded=True)
    return step, variables["cache"]


def _reorder(cache: Cache, parents: Int[Array, "b m"]) -> Cache:
    """Gives each beam its parent's keys and values; those of the encoding belong to all beams."""
    first = jnp.arange(parents.shape[0])[:, None] * parents.shape[1]
    rows = (first + parents).reshape(-1)

    def reorder(path, leaf):
        if path[-1].key in ("cached_key", "cached_value"):
            return jnp.take(leaf, rows, axis=0, mode="clip")
        return leaf

    return jax.tree_util.tree_map_with_path(reorder, cache)
