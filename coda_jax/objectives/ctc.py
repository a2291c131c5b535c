"""Connectionist temporal classification: loss, greedy decoding, prefix beam search, objective.

Axis letters: B batch, N frames, T target tokens, V vocabulary, K beams.
Reference: Graves et al. 2006, Connectionist Temporal Classification.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np
import optax

from coda_jax.data.batches import INCOMPLETE
from coda_jax.models import ModelConfig
from coda_jax.nn.tokens import kept_first, split_frames, take
from coda_jax.objectives.base import Batch, Model, Sums, unanswered
from coda_jax.objectives.generation import Generation

_OPTIONS = ("max_decode_length", "num_beams")


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
    return jnp.where(there, take(best, kept_first(starts, best.shape[1])), blank_id)


class _Beams(NamedTuple):
    """The prefixes kept for one utterance and their log probabilities, by how they end."""

    tokens: Int[Array, "k n"]
    lengths: Int[Array, "k"]
    blank: Float[Array, "k"]  # of the alignments that end in a blank
    token: Float[Array, "k"]  # of those that end in the prefix's last token

    @property
    def total(self) -> Float[Array, "k"]:
        return jnp.logaddexp(self.blank, self.token)


def ctc_beam_search(
    logits: Float[Array, "b n v"], mask: Bool[Array, "b n"], num_beams: int, blank_id: int = 0
) -> tuple[Int[Array, "b k n"], Float[Array, "b k"]]:
    """Prefix beam search: the transcripts of most probability over all their alignments.

    After each frame the `num_beams` most probable prefixes are kept, each with the probability of
    its alignments that went through kept prefixes only. With as many beams as there are prefixes
    the probabilities are exact.

    Args:
        logits: [B, N, V].
        mask: [B, N], False for padding.
        num_beams: K, the prefixes kept.
        blank_id: the token that means no token.

    Returns:
        Tokens [B, K, N] int32, then `blank_id`, the most probable first, and the log probabilities
        [B, K]; -inf for the beams of which there is no prefix.

    Reference: Graves 2012, Sequence Transduction, section 2.5; Hannun et al. 2014, First-Pass Large
    Vocabulary Continuous Speech Recognition.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    never = jnp.full(num_beams, -jnp.inf)
    start = _Beams(
        tokens=jnp.full((num_beams, logits.shape[1]), blank_id, jnp.int32),
        lengths=jnp.zeros(num_beams, jnp.int32),
        blank=never.at[0].set(0.0),
        token=never,
    )

    def search(log_probs, mask):
        def step(beams, frame):
            log_prob, real = frame
            after = _next_beams(beams, log_prob, blank_id)
            return jax.tree.map(lambda new, old: jnp.where(real, new, old), after, beams), None

        beams, _ = jax.lax.scan(step, start, (log_probs, mask))
        return beams.tokens, beams.total

    return jax.vmap(search)(log_probs, mask)


def _next_beams(beams: _Beams, log_prob: Float[Array, "v"], blank_id: int) -> _Beams:
    """The most probable of the prefixes as they are and of those with one more token."""
    num_beams, vocab_size = len(beams.lengths), len(log_prob)
    places = jnp.arange(beams.tokens.shape[1])
    last = jnp.take_along_axis(
        beams.tokens, jnp.maximum(beams.lengths - 1, 0)[:, None], axis=1
    ).squeeze(1)  # `blank_id` for the empty prefix

    # The same token again makes a longer prefix only after a blank.
    repeats = jnp.arange(vocab_size) == last[:, None]
    longer = jnp.where(repeats, beams.blank[:, None], beams.total[:, None]) + log_prob
    longer = longer.at[:, blank_id].set(-jnp.inf)

    # A beam that is another one with one more token takes over what that one would become.
    ends = beams.lengths[:, None] == places
    without_last = jnp.where(places == beams.lengths[:, None] - 1, blank_id, beams.tokens)
    same = (without_last[None] == beams.tokens[:, None]).all(-1)
    extends = same & (beams.lengths > beams.lengths[:, None]) & jnp.isfinite(beams.total)
    taken = jnp.where(extends, longer[:, last], -jnp.inf)  # [from, to]
    longer = longer.at[jnp.arange(num_beams)[:, None], last].min(
        jnp.where(extends, -jnp.inf, jnp.inf)
    )

    repeated = jnp.where(beams.lengths > 0, beams.token + log_prob[last], -jnp.inf)
    kept = beams._replace(
        blank=beams.total + log_prob[blank_id],
        token=jnp.logaddexp(repeated, jax.nn.logsumexp(taken, axis=0)),
    )
    _, best = jax.lax.top_k(jnp.concatenate([kept.total, longer.ravel()]), num_beams)
    is_new = best >= num_beams
    source, token = jnp.divmod(best - num_beams, vocab_size)
    source = jnp.where(is_new, source, best)
    appended = jnp.where(ends[source] & is_new[:, None], token[:, None], beams.tokens[source])
    return _Beams(
        tokens=appended.astype(jnp.int32),
        lengths=beams.lengths[source] + is_new,
        blank=jnp.where(is_new, -jnp.inf, kept.blank[source]),
        token=jnp.where(is_new, longer[source, token], kept.token[source]),
    )


class CTC(Model):
    """An encoder with a CTC head, dense or adapted.

    Raises:
        ValueError: the config's model has no head.
    """

    name: ClassVar[str] = "ctc"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if not config.vocab_size:
            raise ValueError(f"CTC needs a head: vocab_size={config.vocab_size} must be above 0")

    def misfit(self, inputs: np.ndarray, targets: np.ndarray) -> str | None:
        """Says where there are fewer frames than a transcript needs: one for each token and one
        between two equal ones."""
        written = targets[targets != self.config.eos_id]
        needed = len(written) + int((written[1:] == written[:-1]).sum())
        if needed > len(inputs):
            return f"its {len(inputs)} frames are too few for its {len(written)} target tokens"
        return None

    def longest_output(self, inputs: int) -> int:
        """A frame gives one token at most."""
        return inputs

    def is_cut(
        self, tokens: Int[np.ndarray, "b l"], generation: Generation
    ) -> Bool[np.ndarray, "b"]:
        """Which outputs [B, L] fill their length, [B]."""
        del generation
        return tokens[:, -1] != self.config.blank_id

    def logits(self, params, batch: Batch, dropout_rng: Array | None = None):
        """Logits of the frames, [B, N, V] float32; with dropout where an RNG is given.

        Raises:
            ValueError: the batch is packed.
        """
        if "encoder_segment_ids" in batch:
            raise ValueError("the CTC loss is not defined for packed examples: pack=False")
        return self._apply(params, split_frames(batch["encoder_input_tokens"]), dropout_rng)

    def logit_weights(self, batch: Batch) -> Float[Array, "b n"]:
        """1 for each frame that is not padding."""
        return split_frames(batch["encoder_input_tokens"])[1].astype(jnp.float32)

    def loss_of(self, logits: Float[Array, "b n v"], batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """The sum of the utterances' CTC losses, and the sums.

        EOS is not learned: where a transcript ends, the frames say. A target token is right if the
        greedy transcript has it at its place, and an example is exact if the transcripts are equal.
        The weight is the number of target tokens.

        Args:
            logits: of the frames, [B, N, V].
            batch: encoder_input_tokens [B, N, C]; decoder_target_tokens and decoder_loss_weights
                [B, T], whose weights say only what is padding. Rows without frames do not count,
                those that are marked as incomplete are never exact.
        """
        _, mask = split_frames(batch["encoder_input_tokens"])
        blank_id, targets = self.config.blank_id, batch["decoder_target_tokens"]
        target_mask = (batch["decoder_loss_weights"] > 0) & (targets != self.config.eos_id)
        targets = jnp.where(target_mask, targets, blank_id)
        losses = ctc_loss(logits, mask, targets, target_mask, blank_id)
        length = max(targets.shape[1], logits.shape[1])
        found = _padded(ctc_greedy(logits, mask, blank_id), length, blank_id)
        right = found == _padded(targets, length, blank_id)
        real = mask.any(-1)
        exact = right.all(-1) & real & jnp.logical_not(batch.get(INCOMPLETE, False))
        sums = Sums(
            loss=losses.sum(),
            weight=target_mask.sum(dtype=jnp.float32),
            correct=(right[:, : targets.shape[1]] & target_mask).sum(dtype=jnp.float32),
            exact=exact.sum(dtype=jnp.float32),
            examples=real.sum(dtype=jnp.float32),
        )
        return sums.loss, sums

    def check_generation(self, options: Generation) -> None:
        """Raises ValueError where another option is given than a length and a number of beams."""
        neutral = dataclasses.asdict(Generation().resolved())
        others = {
            name: value
            for name, value in options.given_options.items()
            if name not in _OPTIONS and value != neutral[name]
        }
        if others:
            raise ValueError(f"a CTC head has {' and '.join(_OPTIONS)} only, got {others}")

    def generate(
        self, params, encoder_input_tokens, generation: Generation
    ) -> tuple[Int[Array, "b 1 l"], Float[Array, "b 1"]]:
        """The most probable transcript found, [B, 1, max_decode_length] tokens, then `blank_id`.

        One beam is the most probable alignment, more are a prefix beam search; the score is the
        log-probability of the alignment, or of the transcript. Longer ones are cut. Where a logit
        is not finite: see `Model.generate`.

        Raises:
            ValueError: another option than these is given.
        """
        options = generation.resolved()
        self.check_generation(options)
        features, mask = split_frames(encoder_input_tokens)
        logits, blank_id = self._apply(params, (features, mask), None), self.config.blank_id
        if options.num_beams == 1:
            tokens = ctc_greedy(logits, mask, blank_id)
            best = jax.nn.log_softmax(logits.astype(jnp.float32)).max(-1)
            scores = jnp.where(mask, best, 0).sum(-1)
        else:
            tokens, scores = ctc_beam_search(logits, mask, options.num_beams, blank_id)
            tokens, scores = tokens[:, 0], scores[:, 0]
        finite = (jnp.isfinite(logits).all(-1) | ~mask).all(-1)
        scores = jnp.where(finite, scores, jnp.nan)
        tokens = _padded(tokens, options.max_decode_length, blank_id)
        return unanswered(tokens[:, None], scores[:, None])


def _padded(tokens: Array, length: int, value: int) -> Array:
    """The tokens, cut or filled up to a length."""
    tokens = tokens[:, :length]
    return jnp.pad(tokens, ((0, 0), (0, length - tokens.shape[1])), constant_values=value)
