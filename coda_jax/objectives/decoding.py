"""Outputs of a cached decoder: greedy, drawn at random, or from the beam search in `beams`.

The encoder runs once. Each step then feeds one token per row to the decoder and reads the keys and
values of all earlier ones from a cache. A step reads the whole of it, so it has 64 places at first
and four times as many where they are full; each size is a loop of its own in the program. The
rows of an example are its outputs or beams; they are neighbours and share the keys and values of
its encoding. Call these functions under `jax.jit`, with the options static: outside of it, making
the cache costs a decoder pass over all positions whose result nobody reads.

Axis letters: B batch, N input tokens, C channels of an input, R rows of the decoder, P tokens that
are given, the start token among them, L output tokens (`max_decode_length`), V vocabulary, S states
of the stop texts.
"""

from collections.abc import Callable
import itertools
import re
from typing import Any, NamedTuple, TypeVar

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from coda_jax.nn.attention import widened_cache
from coda_jax.objectives import logits_processors
from coda_jax.objectives.generation import Generation

Cache = Any
Inputs = Int[Array, "b n"] | Float[Array, "b n c"]
Stops = UInt[Array, "s v"]
Step = Callable[..., tuple[Float[Array, "rows v"], Cache]]
State = TypeVar("State")
FIRST_PLACES, GROWTH = 64, 4  # of a cache
_SCOPE = "at_most_{}_steps"  # of a loop: a compiled program does not say it otherwise


class Rows(NamedTuple):
    """Rows that are decoded independently of each other.

    Attributes:
        length: how many tokens each has, the start token among them.
        num_given: how many of them were given.
        tokens: [R, 1 + L], the start token first, padding behind the end.
        log_probs: [R] of the tokens that were chosen, by the model alone; NaN from the first logit
            on that is not finite.
        ended: [R]; from the start where an input is only padding, as rows that fill up a batch are.
        keys: [R] random keys, where tokens are drawn; else None.
        matched: [R] states of the stop texts; None without any.
        cache: of the decoder.
    """

    length: Int[Array, ""]
    num_given: Int[Array, ""]
    tokens: Int[Array, "r t"]
    log_probs: Float[Array, " r"]
    ended: Bool[Array, " r"]
    keys: Key[Array, " r"] | None
    matched: UInt[Array, " r"] | None
    cache: Cache


def decode(
    model: nn.Module,
    params: Any,
    encoder_input_tokens: Inputs,
    given: Int[Array, "r p"],
    options: Generation,
    keys: Key[Array, " r"] | None = None,
    stops: Stops | None = None,
) -> tuple[Int[Array, "r l"], Float[Array, " r"]]:
    """The most probable token at each step, or a drawn one, until every row has ended.

    Args:
        model: the network; its config says the end token and that of padding.
        params: its parameters.
        encoder_input_tokens: as the model takes them.
        given: [R, P] what the rows begin with, the start token first; R is a multiple of B.
        options: resolved, without beams.
        keys: [R] random keys, where tokens are drawn.
        stops: [S, V] as `data.stop_texts` makes them.

    Returns:
        tokens [R, L] int32, the end token included and padding after it, and behind what is given
        where an input is only padding; and the log-probabilities [R] float32 that the model gives
        the tokens up to there, excluding the given ones; NaN where a logit was not finite.
    """
    places = cache_places(options.max_decode_length, given.shape[1])
    _, step, rows = begin(
        model, params, encoder_input_tokens, given, options, keys, stops, places=places[0]
    )
    rows = grown(
        rows,
        places,
        lambda rows: ~rows.ended.all(),
        lambda rows: advance(model, rows, step, options, stops),
        lambda rows, most: rows._replace(cache=widened_cache(rows.cache, most)),
    )
    return rows.tokens[:, 1:], rows.log_probs


def cache_places(longest: int, num_given: int = 1) -> tuple[int, ...]:
    """The sizes that a cache has one after the other: at least P, and at last L."""
    sizes = [FIRST_PLACES]
    while sizes[-1] < longest:
        sizes.append(GROWTH * sizes[-1])
    return tuple(min(size, longest) for size in sizes if min(size, longest) >= num_given)


def grown(
    state: State,
    places: tuple[int, ...],
    unfinished: Callable[[State], Bool[Array, ""]],
    advance: Callable[[State], State],
    widened: Callable[[State, int], State],
) -> State:
    """A state with a `length` after as many tokens as it needs, or as there are places.

    Args:
        state: with a cache of `places[0]`.
        places: the sizes of the cache.
        unfinished: whether another token is needed.
        advance: the state after it.
        widened: the state with a cache of another size.
    """
    for before, most in itertools.pairwise((0, *places)):
        state = widened(state, most)
        with jax.named_scope(_SCOPE.format(most - before)):
            state = lax.while_loop(
                lambda state, most=most: (state.length <= most) & unfinished(state), advance, state
            )
    return state


def most_steps(scope: str) -> int | None:
    """How many steps the loop of a scope takes at most; None for another loop."""
    found = re.search(_SCOPE.format(r"(\d+)"), scope)
    return found and int(found.group(1))


def begin(
    model: nn.Module,
    params: Any,
    encoder_input_tokens: Inputs,
    given: Int[Array, "r p"],
    options: Generation,
    keys: Key[Array, " r"] | None = None,
    stops: Stops | None = None,
    places: int | None = None,
) -> tuple[Float[Array, "b k d"], Step, Rows]:
    """(the encoding, the step from it, the rows before their first token); see `decode`.

    The cache has `places`; None for L.
    """
    encoded = model.apply(
        {"params": params}, encoder_input_tokens, enable_dropout=False, method="encode"
    )
    step, make_cache = steps(model, params, encoder_input_tokens, encoded)
    num_rows, num_given = given.shape
    cache = make_cache(jnp.ones((num_rows, places or options.max_decode_length), jnp.int32))
    if num_given > 1:
        cache, _ = lax.scan(
            lambda cache, tokens: (step(cache, tokens)[1], None), cache, given[:, :-1].T
        )
    width = ((0, 0), (0, options.max_decode_length + 1 - num_given))
    empty = ~model.input_mask(encoder_input_tokens).any(-1, keepdims=True)
    rows = Rows(
        length=jnp.int32(num_given),
        num_given=jnp.int32(num_given),
        tokens=jnp.pad(given, width, constant_values=model.config.pad_id),
        log_probs=jnp.zeros(num_rows, jnp.float32),
        ended=jnp.broadcast_to(empty, (len(empty), num_rows // len(empty))).reshape(-1),
        keys=keys,
        matched=None if stops is None else matched(stops, given),
        cache=cache,
    )
    return encoded, step, rows


def steps(
    model: nn.Module, params: Any, encoder_input_tokens: Inputs, encoded: Float[Array, "b k d"]
) -> tuple[Step, Callable[[Int[Array, "r l"]], Cache]]:
    """The step of a decoder, and what makes its cache.

    Returns:
        (cache, previous token of each row, ancestors of beams) -> (logits of the next [R, V],
        cache); and (any tokens [R, L]) -> an empty cache for so many.
    """

    def apply(variables, tokens, **kwargs):
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

    def step(cache, previous, ancestors=None):
        logits, variables = apply({"cache": cache}, previous[:, None], ancestors=ancestors)
        return logits[:, 0], variables["cache"]

    return step, lambda tokens: apply({}, tokens, cache_encoded=True)[1]["cache"]


def advance(
    model: nn.Module, rows: Rows, step: Step, options: Generation, stops: Stops | None
) -> Rows:
    """The rows after one more token."""
    config, length = model.config, rows.length
    previous = lax.dynamic_index_in_dim(rows.tokens, length - 1, axis=1, keepdims=False)
    logits, cache = step(rows.cache, previous)
    scores = logits_processors.processed(
        logits, rows.tokens, length, options, rows.num_given, config.eos_id
    )
    if rows.keys is not None:
        scores = logits_processors.warped(scores, options)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))
        scores += noise(jax.vmap(jax.random.fold_in, (0, None))(rows.keys, length))
    token = scores.argmax(-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    log_prob = chosen - jax.nn.logsumexp(logits, axis=1)
    log_prob = jnp.where(jnp.isfinite(logits).all(-1), log_prob, jnp.nan)
    token = jnp.where(rows.ended, config.pad_id, token)
    ended, matched = after(rows.matched, token, stops, config.eos_id)
    return rows._replace(
        length=length + 1,
        tokens=lax.dynamic_update_slice(rows.tokens, token[:, None], (0, length)),
        log_probs=rows.log_probs + jnp.where(rows.ended, 0.0, log_prob),
        ended=rows.ended | ended,
        matched=matched,
        cache=cache,
    )


def row_keys(
    seed: Int[Array, ""] | UInt[Array, ""] | int, numbers: Array, samples: int
) -> Key[Array, " r"]:
    """[B * samples] random keys, one for each output of the inputs with these numbers, [B]."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    of_inputs = fold(jax.random.key(seed), numbers)
    return jax.vmap(fold, (0, None))(of_inputs, jnp.arange(samples)).reshape(-1)


def matched(stops: Stops, given: Int[Array, "r p"]) -> UInt[Array, " r"]:
    """The states of the stop texts after what is given behind the start token."""
    state = jnp.zeros(given.shape[0], stops.dtype)
    for place in range(1, given.shape[1]):
        state = stops[state, given[:, place]]
    return state


def after(
    matched: UInt[Array, "..."] | None, token: Int[Array, "..."], stops: Stops | None, eos_id: int
) -> tuple[Bool[Array, "..."], UInt[Array, "..."] | None]:
    """What follows from the next token of each output.

    Args:
        matched: [...] states of the stop texts; None without any.
        token: [...] the next tokens, [R] of rows or [B, 2M] of continuations.
        stops: [S, V] as `data.stop_texts` makes them; None without any.
        eos_id: the end token.

    Returns:
        [...] whether the token ends its output, and the states after it.
    """
    if stops is None:
        return token == eos_id, None
    matched = stops[matched, token]
    return (token == eos_id) | (matched == stops.shape[0] - 1), matched
