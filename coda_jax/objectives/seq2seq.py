"""Sequence to sequence: the cross-entropy of the targets, greedy and beam search.

Axis letters: B batch, N input tokens, T target tokens, V vocabulary.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from coda_jax.models import ModelConfig
from coda_jax.objectives import decoding
from coda_jax.objectives.base import Batch, Model, Sums

_PACKING = (
    "encoder_segment_ids",
    "decoder_segment_ids",
    "encoder_positions",
    "decoder_positions",
)


class Seq2Seq(Model):
    """An encoder-decoder, dense or adapted.

    Attributes:
        z_loss: factor of the loss on the squared log of the softmax's normaliser.
    """

    name: ClassVar[str] = "seq2seq"

    def __init__(self, config: ModelConfig, z_loss: float = 0.0):
        super().__init__(config)
        self.z_loss = z_loss

    @property
    def options(self) -> dict[str, Any]:
        """The z-loss."""
        return {"z_loss": self.z_loss}

    def logits(self, params, batch: Batch, dropout_rng: Array | None = None):
        """Logits of the targets, [B, T, V] float32; with dropout where an RNG is given."""
        names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        packing = {name: batch[name] for name in _PACKING if name in batch}
        return self._apply(params, [batch[name] for name in names], dropout_rng, **packing)

    def loss(
        self, params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Float[Array, ""], Sums]:
        """The sum of the weighted token losses, -log p + z_loss * (log Z)^2, and the sums.

        Args:
            params: the parameter tree.
            batch: encoder_input_tokens [B, N] or [B, N, C]; decoder_input_tokens,
                decoder_target_tokens and decoder_loss_weights [B, T]; segment ids and positions too
                where packed.
            dropout_rng: enables dropout.
        """
        logits = self.logits(params, batch, dropout_rng)
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        weights = weights.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        if self.z_loss:
            losses += self.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        right = logits.argmax(-1) == targets
        if "decoder_segment_ids" in batch:
            examples = batch["decoder_segment_ids"].max(-1)
        else:
            examples = (weights > 0).any(-1)
        sums = Sums(
            loss=(losses * weights).sum(),
            weight=weights.sum(),
            correct=(right * weights).sum(),
            exact=((right | (weights == 0)).all(-1) & (weights > 0).any(-1)).sum(dtype=jnp.float32),
            examples=examples.sum(dtype=jnp.float32),
        )
        return sums.loss, sums

    def predict(
        self,
        params,
        encoder_input_tokens,
        *,
        max_decode_length: int,
        num_beams: int = 1,
        alpha: float = 0.6,
    ) -> Array:
        """The most probable outputs found, [B, max_decode_length] tokens; one beam is greedy."""
        if num_beams == 1:
            return decoding.greedy(
                self.module, params, encoder_input_tokens, max_decode_length=max_decode_length
            )[0]
        tokens, _ = decoding.beam_search(
            self.module,
            params,
            encoder_input_tokens,
            max_decode_length=max_decode_length,
            num_beams=num_beams,
            alpha=alpha,
        )
        return tokens[:, 0]
