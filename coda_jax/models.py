"""What a trainer needs of a model: its loss and its scores, on batches of numpy arrays.

Axis letters: B batch, N input tokens, T target tokens, V vocabulary.
The encoder's inputs are [B, N] token ids, or [B, N, C] vectors: whatever the config's family takes.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from coda_jax import decoding
from coda_jax.network import T5Config, init_params

Batch = dict[str, Array]
_PACKING = (
    "encoder_segment_ids",
    "decoder_segment_ids",
    "encoder_positions",
    "decoder_positions",
)


@flax.struct.dataclass
class Sums:
    """Sums over a batch; those of several batches add up.

    Attributes:
        loss: of the target tokens' losses, weighted.
        weight: of the target tokens' weights.
        correct: of the weighted target tokens whose most probable token is right.
        exact: of the targets all of whose tokens are most probable, that is, of the examples that
            greedy decoding gets right to the last token (unpacked batches).
        examples: number of examples (segments, where rows are packed).
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    exact: Float[Array, ""]
    examples: Float[Array, ""]

    def metrics(self) -> dict[str, float]:
        """Means: loss and accuracy per token, exact match per example."""
        weight, examples = jnp.maximum(self.weight, 1), jnp.maximum(self.examples, 1)
        return {
            "loss": float(self.loss / weight),
            "token_accuracy": float(self.correct / weight),
            "exact_match": float(self.exact / examples),
        }


class EncoderDecoder:
    """An encoder-decoder with or without adapters and routing.

    Attributes:
        config: the model's configuration; it decides the family.
        module: its network.
        z_loss: factor of the loss on the squared log of the softmax's normaliser.
    """

    def __init__(self, config: T5Config, z_loss: float = 0.0):
        self.config = config
        self.module = config.network()
        self.z_loss = z_loss

    def init(self, rng: Array) -> dict[str, Any]:
        """Random parameters."""
        return init_params(self.module, rng)

    def logits(self, params, batch: Batch, dropout_rng: Array | None = None):
        """Logits of the targets, [B, T, V] float32; with dropout where an RNG is given."""
        return self.module.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            **{name: batch[name] for name in _PACKING if name in batch},
            enable_dropout=dropout_rng is not None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )

    def encode(self, params, encoder_input_tokens) -> Float[Array, "b n d"]:
        """The encoder's output, [B, N, D], without dropout."""
        return self.module.apply(
            {"params": params}, encoder_input_tokens, enable_dropout=False, method="encode"
        )

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

    def routing(self, params, encoder_input_tokens) -> Float[Array, "layers b n"]:
        """The weight with which each encoder layer takes each token, 0 where it does not.

        A layer without a router, or with r = 1, takes every token with weight 1.
        """
        _, variables = self.module.apply(
            {"params": params},
            encoder_input_tokens,
            enable_dropout=False,
            method="encode",
            mutable=["intermediates"],
        )
        encoder = variables.get("intermediates", {}).get("encoder", {})
        every_token = self.module.input_mask(encoder_input_tokens).astype(jnp.float32)

        def weights(layer):
            if f"layers_{layer}" not in encoder:
                return every_token
            (selection,) = encoder[f"layers_{layer}"]["router"]["selection"]
            rows = jnp.arange(every_token.shape[0])[:, None]
            return jnp.zeros_like(every_token).at[rows, selection.indices].set(selection.weights)

        return jnp.stack([weights(i) for i in range(self.config.num_encoder_layers)])
