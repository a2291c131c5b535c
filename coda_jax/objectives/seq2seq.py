"""Sequence to sequence: the cross-entropy of the targets, greedy and beam search.

Axis letters: B batch, N input tokens, T target tokens, V vocabulary, D embedding.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt
import optax

from coda_jax import checks
from coda_jax.data.batches import INCOMPLETE
from coda_jax.methods import check_packs
from coda_jax.methods.cross_attention import segments_read
from coda_jax.models import ModelConfig
from coda_jax.nn.tokens import pool, take
from coda_jax.objectives import beams, decoding
from coda_jax.objectives.base import Batch, Model, Sums, unanswered
from coda_jax.objectives.generation import Generation
from coda_jax.objectives.prefix_tree import PrefixTree

Z_LOSS = checks.Number(least=0)
_PACKING = (
    "encoder_segment_ids",
    "decoder_segment_ids",
    "encoder_positions",
    "decoder_positions",
)


class ScoredTargets(NamedTuple):
    """What a model makes of inputs and a list of targets.

    Attributes:
        log_probs: [B, L] float32, of each whole target.
        encoder: [B, D] float32, the mean of the encoder's outputs that the decoder attends to.
        decoder: [B, D] float32, the decoder's state at its first token.
    """

    log_probs: Float[Array, "b l"]
    encoder: Float[Array, "b d"]
    decoder: Float[Array, "b d"]


class Seq2Seq(Model):
    """An encoder-decoder, dense or adapted.

    Attributes:
        z_loss: factor of the loss on the squared log of the softmax's normaliser.
    """

    name: ClassVar[str] = "seq2seq"
    logits_read_targets: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, z_loss: float = 0.0):
        super().__init__(config)
        self.z_loss = Z_LOSS("Z_LOSS", z_loss)

    @property
    def options(self) -> dict[str, Any]:
        """The z-loss."""
        return {"z_loss": self.z_loss}

    def logits(self, params, batch: Batch, dropout_rng: Array | None = None):
        """Logits of the targets, [B, T, V] float32; with dropout where an RNG is given."""
        names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        packing = {name: batch[name] for name in _PACKING if name in batch}
        if packing:
            check_packs(self.config.methods)
        return self._apply(params, [batch[name] for name in names], dropout_rng, **packing)

    def logit_weights(self, batch: Batch) -> Float[Array, "b t"]:
        """The weights of the target tokens."""
        return batch["decoder_loss_weights"].astype(jnp.float32)

    def loss_of(self, logits: Float[Array, "b t v"], batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """The sum of the weighted token losses, -log p + z_loss * (log Z)^2, and the sums.

        Args:
            logits: of the targets, [B, T, V].
            batch: encoder_input_tokens [B, N] or [B, N, C]; decoder_input_tokens,
                decoder_target_tokens and decoder_loss_weights [B, T]; segment ids and positions too
                where packed. Rows that are marked as incomplete are never exact.
        """
        targets, weights = batch["decoder_target_tokens"], self.logit_weights(batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        if self.z_loss:
            losses += self.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        right = logits.argmax(-1) == targets
        if "decoder_segment_ids" in batch:
            examples = batch["decoder_segment_ids"].max(-1)
        else:
            examples = (weights > 0).any(-1)
        exact = (right | (weights == 0)).all(-1) & (weights > 0).any(-1)
        sums = Sums(
            loss=(losses * weights).sum(),
            weight=weights.sum(),
            correct=(right * weights).sum(),
            exact=(exact & jnp.logical_not(batch.get(INCOMPLETE, False))).sum(dtype=jnp.float32),
            examples=examples.sum(dtype=jnp.float32),
        )
        return sums.loss, sums

    def check_generation(self, options: Generation) -> None:
        """Raises ValueError where a token to begin with is not in the vocabulary."""
        forced = (options.forced_bos_token_id,) if options.forced_bos_token_id is not None else ()
        for token in (*forced, *options.decoder_prefix):
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"outputs cannot begin with token {token}: the model has 0 to "
                    f"{self.config.vocab_size - 1}"
                )

    def generate(
        self,
        params,
        encoder_input_tokens,
        generation: Generation,
        *,
        seed=None,
        numbers: Int[Array, " b"] | None = None,
        prefix: Int[Array, "b p"] | None = None,
        stops: UInt[Array, "s v"] | None = None,
    ) -> tuple[Int[Array, "b n l"], Float[Array, "b n"]]:
        """The best outputs, or drawn ones; the encoder runs once for all of an input's.

        Args:
            params: the parameter tree.
            encoder_input_tokens: [B, N] or [B, N, C].
            generation: the options.
            seed: of the draws; None for that of `generation`. It may be traced.
            numbers: [B] the inputs' numbers, on which their draws depend; None for 0, 1, ...
            prefix: [B, P] what each output begins with; None for what `generation` says.
            stops: of the stop texts, which are no texts here; see `data.stop_texts`.

        Returns:
            tokens [B, n, L] int32, the best first, the end token included and padding after it; and
            scores [B, n] float32. Without beams these are sums of the model's log-probabilities of
            the tokens behind the prefix, whatever an option made of them; with beams, what the
            outputs are ranked by: see `beams`. Where a logit is not finite: see `Model.generate`.
            A row of inputs that is only padding, to fill up a batch, takes no step: its output is
            the prefix and padding, its score 0.

        Raises:
            ValueError: options contradict each other or the vocabulary; stop texts lack `stops`;
                see `check_places`.
        """
        options, batch = generation.resolved(), encoder_input_tokens.shape[0]
        self.check_places(encoder_input_tokens)
        given = self._given(options, batch, prefix, stops)
        inputs = self.module, params, encoder_input_tokens, given, options
        if options.num_beams > 1:
            tokens, scores = beams.beam_search(*inputs, stops)
            count = options.num_return_sequences
            return unanswered(tokens[:, :count], scores[:, :count])
        keys = self._keys(options, batch, seed, numbers)
        tokens, scores = decoding.decode(*inputs, keys, stops)
        shape = -1, options.num_return_sequences
        tokens, scores = tokens.reshape(*shape, tokens.shape[-1]), scores.reshape(shape)
        if options.num_return_sequences > 1:
            order = jnp.argsort(-scores, axis=1)
            tokens, scores = take(tokens, order), take(scores, order)
        return unanswered(tokens, scores)

    def log_probs(self, tokens, scores, generation: Generation, stops=None):
        """The log-probabilities of outputs, which with beams are ranked by others.

        Args:
            tokens: [B, n, L] what `generate` gave.
            scores: [B, n] with it.
            generation: the options, resolved.
            stops: of the stop texts.

        Returns:
            [B, n], sums over the tokens behind the prefix, the end token included.
        """
        if generation.num_beams == 1:
            return scores
        special = self.config.pad_id, self.config.eos_id
        return beams.log_probs(tokens, scores, generation, *special, stops)

    def score_targets(
        self,
        params,
        encoder_input_tokens,
        tree: PrefixTree,
        encoded: Float[Array, "b n d"] | None = None,
    ) -> ScoredTargets:
        """The log-probabilities of the same targets for each input, and features of the inputs.

        The encoder runs once for an input, the decoder once for each node of the tree, in one row.
        The logits of a batch are [B, M, V], for M nodes.

        Args:
            params: the parameter tree.
            encoder_input_tokens: [B, N] or [B, N, C].
            tree: of the targets.
            encoded: what `encode_selecting` gives, where it is known.
        """
        self.check_places(encoder_input_tokens)
        if encoded is None:
            encoded = self._apply(params, [encoder_input_tokens], None, method="encode")
        read = segments_read(self.config, self.module.input_mask(encoder_input_tokens)) > 0
        shape = encoded.shape[0], len(tree.tokens)
        logits, sown = self.module.apply(
            {"params": params},
            encoded,
            encoder_input_tokens,
            jnp.broadcast_to(tree.tokens, shape),
            jnp.broadcast_to(jnp.int32(self.config.eos_id), shape),  # no node is padding
            enable_dropout=False,
            tree=jnp.asarray(tree.seen),
            method="decode",
            mutable=["intermediates"],
        )
        log_sums = jax.nn.logsumexp(logits, axis=-1)
        found = logits[:, tree.nodes, tree.targets] - log_sums[:, tree.nodes]
        (states,) = sown["intermediates"]["decoder"]["states"]
        return ScoredTargets(
            jnp.where(tree.written, found, 0).sum(-1),
            pool(encoded, read, "mean"),
            states[:, 0].astype(jnp.float32),
        )

    def stepwise(self, generation: Generation) -> tuple[Callable, Callable]:
        """Generation token by token, for one output of each input.

        Args:
            generation: the options, without beams.

        Returns:
            (begin, grow), to be traced. `begin` takes what `generate` takes, but for the options,
            and gives (encoded, rows); `grow(params, inputs, encoded, rows, stops)` gives the rows
            with one more token: see `decoding.Rows`.

        Raises:
            ValueError: beams, which may yet take back what they have chosen, or several outputs.
        """
        options = generation.resolved()
        if options.num_beams > 1 or options.num_return_sequences > 1:
            raise ValueError(
                "tokens come one by one for one output without beams, got num_beams="
                f"{options.num_beams}, num_return_sequences={options.num_return_sequences}"
            )

        def begin(params, inputs, *, seed=None, numbers=None, prefix=None, stops=None):
            given = self._given(options, len(inputs), prefix, stops)
            keys = self._keys(options, len(inputs), seed, numbers)
            encoded, _, rows = decoding.begin(
                self.module, params, inputs, given, options, keys, stops
            )
            return encoded, rows

        def grow(params, inputs, encoded, rows, stops=None):
            step, _ = decoding.steps(self.module, params, inputs, encoded)
            return decoding.advance(self.module, rows, step, options, stops)

        return begin, grow

    def _given(self, options, batch, prefix, stops) -> Int[Array, "r p"]:
        """What each row of the decoder begins with, the start token first."""
        self.check_generation(options)
        if options.stop_strings and stops is None:
            raise ValueError(f"stop_strings={options.stop_strings} need a vocabulary")
        if prefix is None:
            prefix = jnp.tile(jnp.array(options.decoder_prefix, jnp.int32), (batch, 1))
        elif prefix.shape[1] >= options.max_decode_length:
            raise ValueError(
                f"a prefix of {prefix.shape[1]} tokens leaves none of "
                f"max_decode_length={options.max_decode_length}"
            )
        given = jnp.pad(prefix, ((0, 0), (1, 0)), constant_values=self.config.decoder_start_id)
        rows = max(options.num_beams, options.num_return_sequences)
        return jnp.repeat(given, rows, axis=0)

    def _keys(self, options, batch, seed, numbers):
        """[R] random keys, where tokens are drawn."""
        if not options.do_sample:
            return None
        numbers = jnp.arange(batch) if numbers is None else numbers
        seed = options.seed if seed is None else seed
        return decoding.row_keys(seed, numbers, options.num_return_sequences)
