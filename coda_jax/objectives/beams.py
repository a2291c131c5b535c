"""Beam search over a cached decoder, by the rules of T5X or of transformers.

Both look at the 2M best continuations of the M live beams in each step: those that end compete with
the finished beams, the M best of the others live on. They differ in how a finished beam is ranked,
in which may finish, and in when a search is over; that is a record of rules.

Axis letters: B batch, M beams, R = B * M rows of the decoder, P tokens that are given, the start
token among them, L output tokens, V vocabulary, S states of the stop texts.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt
import numpy as np

from coda_jax.nn.attention import widened_cache
from coda_jax.nn.tokens import take
from coda_jax.objectives import decoding, logits_processors
from coda_jax.objectives.decoding import Cache, Inputs, Step, Stops
from coda_jax.objectives.generation import Generation
from coda_jax.sharding import num_parts

# The log-probability of what must not be chosen, as in T5X: finite, so that no `inf - inf` arises.
_IMPOSSIBLE = -1e7
NO_OUTPUT = -1e6  # scores below are of no output: fewer were found than asked for


@dataclasses.dataclass(frozen=True)
class T5XRules:
    """log p / ((5 + length) / 6)^alpha, the length with everything that was given.

    Every beam that ends is a candidate, and the search goes on while a live beam could displace a
    finished one at some length.

    Attributes:
        alpha: 0 for no length penalty; more favours longer outputs.
        longest: L.
        prefix_length: P - 1.
    """

    alpha: float
    longest: int
    prefix_length: int

    def score(
        self, log_probs: Float[Array, "b n"], new_tokens: Int[Array, ""]
    ) -> Float[Array, "b n"]:
        """The scores of beams with so many tokens behind the prefix, [B, 2M]."""
        return log_probs / self.penalty(new_tokens)

    def penalty(self, new_tokens: Int[Array, "..."]) -> Float[Array, "..."]:
        """By what the log-probabilities of beams that ended are divided."""
        return self._penalty(self.prefix_length + new_tokens)

    def best_possible_score(
        self, log_probs: Float[Array, "b 1"], new_tokens: Int[Array, ""]
    ) -> Float[Array, "b 1"]:
        """What the best live beams may still score, [B, 1].

        As they are, at the length that is best for a sum of log-probabilities, which is not above
        0: the greatest, or with a negative alpha the next.
        """
        longest = self._penalty(self.longest + 1)
        return log_probs / jnp.maximum(longest, self._penalty(self.prefix_length + new_tokens + 1))

    def finishing(self, ended: Bool[Array, "b n"], at_end: Bool[Array, ""]) -> Bool[Array, "b n"]:
        """Which of the 2M continuations [B, 2M], best first, may become finished beams."""
        del at_end  # a row in which no beam ends answers with its live ones
        return ended

    def settled(self, occupied: Bool[Array, "b m"]) -> Bool[Array, "b 1"]:
        """[B, 1], the rows whose full slots [B, M] end the search."""
        return jnp.zeros((occupied.shape[0], 1), bool)

    def _penalty(self, length):
        return jnp.float32((5 + length) / 6) ** self.alpha


@dataclasses.dataclass(frozen=True)
class TransformersRules:
    """log p / length^penalty, the length without what was given.

    Only a beam that ends among the M best continuations is a candidate, and at the last place every
    one of those is.

    Attributes:
        exponent: `length_penalty`.
        early_stopping: see `Generation`.
        longest: L.
        prefix_length: P - 1.
    """

    exponent: float
    early_stopping: bool | str
    longest: int
    prefix_length: int

    def score(
        self, log_probs: Float[Array, "b n"], new_tokens: Int[Array, ""]
    ) -> Float[Array, "b n"]:
        """The scores of beams with so many tokens behind the prefix, [B, 2M]."""
        return log_probs / self.penalty(new_tokens)

    def penalty(self, new_tokens: Int[Array, "..."]) -> Float[Array, "..."]:
        """By what the log-probabilities of beams are divided."""
        return jnp.float32(new_tokens) ** self.exponent

    def best_possible_score(
        self, log_probs: Float[Array, "b 1"], new_tokens: Int[Array, ""]
    ) -> Float[Array, "b 1"]:
        """What the best live beams might score at most, [B, 1]; exact only with "never"."""
        if self.early_stopping == "never":
            longest = self.longest - self.prefix_length
            new_tokens = jnp.where(self.exponent > 0, longest, new_tokens)
        return self.score(log_probs, new_tokens)

    def finishing(self, ended: Bool[Array, "b n"], at_end: Bool[Array, ""]) -> Bool[Array, "b n"]:
        """Which of the 2M continuations [B, 2M], best first, may become finished beams."""
        among_best = jnp.arange(ended.shape[1]) < ended.shape[1] // 2
        return (ended | at_end) & among_best

    def settled(self, occupied: Bool[Array, "b m"]) -> Bool[Array, "b 1"]:
        """[B, 1], the rows whose full slots [B, M] end the search."""
        return occupied.all(axis=1, keepdims=True) & (self.early_stopping is True)


Rules = T5XRules | TransformersRules


def _rules(options: Generation, prefix_length: int) -> Rules:
    """Those that resolved options ask for."""
    lengths = options.max_decode_length, prefix_length
    if options.length_penalty is None:
        return T5XRules(options.alpha, *lengths)
    return TransformersRules(options.length_penalty, options.early_stopping, *lengths)


class _Beams(NamedTuple):
    """The state of a beam search; in each row the best beam comes first.

    Attributes:
        length: how many tokens the live beams have, the start token among them.
        live: [B, M, 1 + L] tokens of the beams that go on.
        live_log_probs: [B, M].
        matched: [B, M] states of the stop texts; None without any.
        finished: [B, M, 1 + L] tokens of the best beams that ended.
        scores: [B, M] theirs.
        occupied: [B, M], False where `finished` has no beam yet.
        open: [B, 1], whether the search of a row goes on.
        finite: [B, 1], whether all logits were, of a search that went on.
        ancestors: [B, M, places], which beam wrote what each live one sees at a place of the cache:
            beams take over those of others, and the cache stays as it was written.
        cache: of the decoder.
    """

    length: Int[Array, ""]
    live: Int[Array, "b m t"]
    live_log_probs: Float[Array, "b m"]
    matched: UInt[Array, "b m"] | None
    finished: Int[Array, "b m t"]
    scores: Float[Array, "b m"]
    occupied: Bool[Array, "b m"]
    open: Bool[Array, "b 1"]
    finite: Bool[Array, "b 1"]
    ancestors: Int[Array, "b m l"]
    cache: Cache


def beam_search(
    model: nn.Module,
    params: Any,
    encoder_input_tokens: Inputs,
    given: Int[Array, "r p"],
    options: Generation,
    stops: Stops | None = None,
) -> tuple[Int[Array, "b m l"], Float[Array, "b m"]]:
    """The M best outputs found.

    By T5X's rules, a row in which no beam ended returns its live beams, with log-probabilities
    without the length penalty. Slots for which there are fewer than M different outputs score below
    -1e6, as do all but one of an input that is only padding.

    Args:
        model: the network; its config says the end token and that of padding.
        params: its parameters.
        encoder_input_tokens: as the model takes them.
        given: [R, P] what the rows begin with, the start token first.
        options: resolved; M is its `num_beams`.
        stops: [S, V] as `data.stop_texts` makes them.

    Returns:
        tokens [B, M, L] int32, best first, the end token included and padding after it; scores
        [B, M] float32, by which they are ranked: log-probabilities, processed as the options say,
        under the length penalty; NaN where a logit of the row was not finite.
    """
    rules = _rules(options, given.shape[1] - 1)
    places = decoding.cache_places(options.max_decode_length, given.shape[1])
    _, step, rows = decoding.begin(
        model, params, encoder_input_tokens, given, options, stops=stops, places=places[0]
    )
    beams = decoding.grown(
        _first_beams(rows, options.num_beams, places[0]),
        places,
        lambda beams: beams.open.any(),
        lambda beams: _advance(model, beams, step, options, rules, stops),
        _widened,
    )
    any_finished = beams.occupied.any(axis=1, keepdims=True)
    tokens = jnp.where(any_finished[..., None], beams.finished, beams.live)
    finished = jnp.where(beams.occupied, beams.scores, _IMPOSSIBLE)
    scores = jnp.where(any_finished, finished, beams.live_log_probs)
    return tokens[..., 1:], jnp.where(beams.finite, scores, jnp.nan)


def log_probs(
    tokens: Int[np.ndarray, "b n l"],
    scores: Float[np.ndarray, "b n"],
    options: Generation,
    pad_id: int,
    eos_id: int,
    stops: Stops | None = None,
) -> Float[np.ndarray, "b n"]:
    """The log-probabilities, processed as the options say, of what `beam_search` has scored.

    Args:
        tokens: [B, n, L] the best n outputs.
        scores: [B, n] theirs.
        options: those of the search.
        pad_id, eos_id: those of the model.
        stops: those of the search.

    Returns:
        [B, n], sums over the tokens behind the prefix; scores of no output as they are.
    """
    prefix_length = len(options.decoder_prefix)
    written = tokens[..., prefix_length:]
    new_tokens = written.shape[-1] - (written[..., ::-1] != pad_id).argmax(-1)
    ended = (written == eos_id).any(-1)
    if stops is not None:
        stops = jnp.asarray(np.asarray(stops))  # which other processes may hold, too
        with_start = np.pad(tokens.reshape(-1, tokens.shape[-1]), ((0, 0), (1, 0)))
        last = np.asarray(decoding.matched(stops, with_start)).reshape(ended.shape)
        ended |= (last == stops.shape[0] - 1) | (tokens[..., -1] == pad_id)
    new_tokens = np.where(ended, new_tokens, written.shape[-1])
    penalty = np.asarray(_rules(options, prefix_length).penalty(new_tokens))
    if options.length_penalty is None:  # a row in which no beam ended is ranked without
        penalty = np.where(ended[:, :1], penalty, 1)
    return np.where(scores > NO_OUTPUT, scores * penalty, scores)


def _widened(beams: _Beams, places: int) -> _Beams:
    """The beams with a cache of another size."""
    added = places - beams.ancestors.shape[2]
    return beams._replace(
        ancestors=jnp.pad(beams.ancestors, ((0, 0), (0, 0), (0, added))),
        cache=widened_cache(beams.cache, places),
    )


def _first_beams(rows: decoding.Rows, num_beams: int, places: int) -> _Beams:
    """The beams before their first token."""
    tokens = rows.tokens.reshape(-1, num_beams, rows.tokens.shape[1])
    no_scores = jnp.full(tokens.shape[:2], _IMPOSSIBLE, jnp.float32)
    # An input that is only padding has one finished beam, which is empty.
    ended = rows.ended.reshape(-1, num_beams)[:, :1]
    occupied = ended & (jnp.arange(num_beams) == 0)
    return _Beams(
        length=rows.length,
        live=tokens,
        live_log_probs=no_scores.at[:, 0].set(0.0),  # all beams are equal: only one may go on
        matched=None if rows.matched is None else rows.matched.reshape(-1, num_beams),
        finished=tokens,
        scores=jnp.where(occupied, 0.0, -jnp.inf),
        occupied=occupied,
        open=~ended,
        finite=jnp.ones((tokens.shape[0], 1), bool),
        ancestors=jnp.zeros((*tokens.shape[:2], places), jnp.int32),
        cache=rows.cache,
    )


def _advance(
    model: nn.Module,
    beams: _Beams,
    step: Step,
    options: Generation,
    rules: Rules,
    stops: Stops | None,
) -> _Beams:
    """The beams after one more token."""
    config, length, num_beams = model.config, beams.length, options.num_beams
    beams = beams._replace(ancestors=_with_own_places(beams.ancestors, length - 1))
    log_probs, finite, cache = _continuations(model, beams, step, options, rules)
    # Twice as many as live on: if M of them end, M are left.
    vocab_size = log_probs.shape[-1]
    log_probs, chosen = _largest(log_probs, 2 * num_beams)
    parents, token = chosen // vocab_size, chosen % vocab_size
    tokens = lax.dynamic_update_slice(take(beams.live, parents), token[..., None], (0, 0, length))
    matched = None if beams.matched is None else take(beams.matched, parents)
    ended, matched = decoding.after(matched, token, stops, config.eos_id)

    live_log_probs, rank = lax.top_k(log_probs + ended * _IMPOSSIBLE, num_beams)

    new_tokens = length - rules.prefix_length
    finishing = rules.finishing(ended, length == rules.longest) & beams.open
    # A length penalty may bring a score below any finite number for an empty slot.
    scores = jnp.where(finishing, rules.score(log_probs, new_tokens), -jnp.inf)
    scores, best = lax.top_k(jnp.concatenate([beams.scores, scores], axis=1), num_beams)
    occupied = take(jnp.concatenate([beams.occupied, finishing], axis=1), best)
    # The best live beam against the worst finished one.
    best_possible = rules.best_possible_score(live_log_probs[:, :1], new_tokens)
    can_improve = (best_possible > scores).any(1, keepdims=True)
    alive = live_log_probs[:, :1] >= _IMPOSSIBLE
    return _Beams(
        length=length + 1,
        live=take(tokens, rank),
        live_log_probs=live_log_probs,
        matched=None if matched is None else take(matched, rank),
        finished=take(jnp.concatenate([beams.finished, tokens], axis=1), best),
        scores=scores,
        occupied=occupied,
        open=beams.open & can_improve & alive & ~rules.settled(occupied),
        finite=beams.finite & (finite | ~beams.open),
        ancestors=take(beams.ancestors, take(parents, rank)),
        cache=cache,
    )


def _with_own_places(ancestors: Int[Array, "b m l"], place: Array) -> Int[Array, "b m l"]:
    """From this place of the cache on, each beam sees what it writes itself."""
    own = jnp.arange(ancestors.shape[1], dtype=jnp.int32)[:, None]
    return jnp.where(jnp.arange(ancestors.shape[2]) < place, ancestors, own)


def _continuations(
    model: nn.Module, beams: _Beams, step: Step, options: Generation, rules: Rules
) -> tuple[Float[Array, "b m v"], Bool[Array, "b 1"], Cache]:
    """The log-probabilities of each beam with each next token, [B, M, V]; see `_Beams.finite`."""
    tokens = beams.live.reshape(-1, beams.live.shape[-1])
    previous = lax.dynamic_index_in_dim(tokens, beams.length - 1, axis=1, keepdims=False)
    logits, cache = step(beams.cache, previous, beams.ancestors)
    log_probs = logits_processors.processed(
        jax.nn.log_softmax(logits),
        tokens,
        beams.length,
        options,
        rules.prefix_length + 1,
        model.config.eos_id,
    )
    log_probs = log_probs.reshape(*beams.live.shape[:2], -1) + beams.live_log_probs[..., None]
    batch = beams.live.shape[0]
    # Over the vocabulary first, which chips may share.
    finite = jnp.isfinite(logits).all(-1).reshape(batch, -1).all(1, keepdims=True)
    return log_probs, finite, cache


def _largest(
    values: Float[Array, "b m v"], count: int
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The largest of each row, [B, K], and where they stand in [M * V]; of equal ones the first."""

    def flat(values):
        return tuple(lax.top_k(values.reshape(values.shape[0], -1), count))

    divided = num_parts("batch", values.shape[0]) * num_parts("vocab", values.shape[2]) > 1
    tpu = functools.partial(_largest_in_rounds, count=count) if divided else flat
    return lax.platform_dependent(values, tpu=tpu, default=flat)


def _largest_in_rounds(values, *, count):
    """One after the other, of each beam, then of all.

    A TPU's `top_k` runs on one chip, to which all others would send their rows and logits.
    """
    lowest = jnp.finfo(values.dtype).min
    left = jnp.maximum(values, lowest)  # what is taken is less
    places = jnp.arange(values.shape[-1], dtype=jnp.int32)
    found = []
    for _ in range(min(count, values.shape[-1])):
        place = left.argmax(-1, keepdims=True).astype(jnp.int32)
        found.append((left.max(-1), place[..., 0]))
        left = jnp.where(places == place, -jnp.inf, left)
    best, place = (jnp.stack(x, axis=-1) for x in zip(*found, strict=True))
    offsets = jnp.arange(values.shape[1], dtype=jnp.int32)[:, None] * values.shape[-1]
    best, place = (x.reshape(x.shape[0], -1) for x in (best, place + offsets))
    best, chosen = lax.top_k(jnp.where(best == lowest, -jnp.inf, best), count)
    return best, jnp.take_along_axis(place, chosen, axis=1)
