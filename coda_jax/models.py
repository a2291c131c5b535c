"""What a trainer needs of a model: its loss and its scores, on batches of numpy arrays.

Axis letters: B batch, N input tokens, T target tokens, V vocabulary.
The encoder's inputs are [B, N] token ids, or [B, N, C] vectors: whatever the config's family takes.
`for_config` picks the class.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from coda_jax import decoding
from coda_jax.ctc import ctc_beam_search, ctc_greedy, ctc_loss
from coda_jax.network import T5Config, init_params
from coda_jax.speech import SpeechCTC, W2vBertConfig, split_frames

Batch = dict[str, Array]
_PACKING = (
    "encoder_segment_ids",
    "decoder_segment_ids",
    "encoder_positions",
    "decoder_positions",
)
_EOS_ID = 1  # of the tasks' vocabularies


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


class Model:
    """What all models have; each adds `loss`, and those that answer `logits` and `predict`.

    Attributes:
        config: the model's configuration; it decides the family.
        module: its network.
    """

    def __init__(self, config: T5Config):
        self.config = config
        self.module = config.network()

    @property
    def needs_rng(self) -> bool:
        """Whether the loss draws random numbers in training."""
        return self.config.dropout_rate > 0

    def init(self, rng: Array) -> dict[str, Any]:
        """Random parameters."""
        return init_params(self.module, rng)

    def _apply(self, params, inputs, dropout_rng, **kwargs):
        """The network's output, with dropout where an RNG is given."""
        return self.module.apply(
            {"params": params},
            *inputs,
            **kwargs,
            enable_dropout=dropout_rng is not None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )

    def encode(self, params, encoder_input_tokens) -> Float[Array, "b n d"]:
        """The encoder's output, [B, N, D], without dropout."""
        return self.module.apply(
            {"params": params}, encoder_input_tokens, enable_dropout=False, method="encode"
        )

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


class EncoderDecoder(Model):
    """An encoder-decoder with or without adapters and routing.

    Attributes:
        z_loss: factor of the loss on the squared log of the softmax's normaliser.
    """

    def __init__(self, config: T5Config, z_loss: float = 0.0):
        super().__init__(config)
        self.z_loss = z_loss

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


class CTC(Model):
    """A speech encoder with a CTC head, with or without adapters and routing.

    Raises:
        ValueError: the config's model has no head.
    """

    def __init__(self, config: W2vBertConfig):
        super().__init__(config)
        if not isinstance(self.module, SpeechCTC) or not config.vocab_size:
            raise ValueError(
                f"CTC needs a head: vocab_size={config.vocab_size} must be above 0 and "
                f"num_decoder_layers={config.num_decoder_layers} must be 0"
            )

    def logits(self, params, batch: Batch, dropout_rng: Array | None = None):
        """Logits of the frames, [B, N, V] float32; with dropout where an RNG is given."""
        return self._apply(params, split_frames(batch["encoder_input_tokens"]), dropout_rng)

    def loss(
        self, params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Float[Array, ""], Sums]:
        """The sum of the utterances' CTC losses, and the sums.

        EOS is not learned: where a transcript ends, the frames say. A target token is right if the
        greedy transcript has it at its place, and an example is exact if the transcripts are equal.
        The weight is the number of target tokens.

        Args:
            params: the parameter tree.
            batch: encoder_input_tokens [B, N, C]; decoder_target_tokens and decoder_loss_weights
                [B, T], whose weights say only what is padding. Rows without frames do not count.
            dropout_rng: enables dropout.

        Raises:
            ValueError: the batch is packed.
        """
        if "encoder_segment_ids" in batch:
            raise ValueError("the CTC loss is not defined for packed examples: pack=False")
        logits = self.logits(params, batch, dropout_rng)
        _, mask = split_frames(batch["encoder_input_tokens"])
        blank_id, targets = self.config.blank_id, batch["decoder_target_tokens"]
        target_mask = (batch["decoder_loss_weights"] > 0) & (targets != _EOS_ID)
        targets = jnp.where(target_mask, targets, blank_id)
        losses = ctc_loss(logits, mask, targets, target_mask, blank_id)
        length = max(targets.shape[1], logits.shape[1])
        found = _padded(ctc_greedy(logits, mask, blank_id), length, blank_id)
        right = found == _padded(targets, length, blank_id)
        real = mask.any(-1)
        sums = Sums(
            loss=losses.sum(),
            weight=target_mask.sum(dtype=jnp.float32),
            correct=(right[:, : targets.shape[1]] & target_mask).sum(dtype=jnp.float32),
            exact=(right.all(-1) & real).sum(dtype=jnp.float32),
            examples=real.sum(dtype=jnp.float32),
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
        """The most probable transcripts found, [B, max_decode_length] tokens, then `blank_id`.

        One beam is the most probable alignment, more are a prefix beam search. Longer ones are cut.
        """
        del alpha  # transcripts are not compared by their lengths
        features, mask = split_frames(encoder_input_tokens)
        logits, blank_id = self._apply(params, (features, mask), None), self.config.blank_id
        if num_beams == 1:
            tokens = ctc_greedy(logits, mask, blank_id)
        else:
            tokens = ctc_beam_search(logits, mask, num_beams, blank_id)[0][:, 0]
        return _padded(tokens, max_decode_length, blank_id)


def _padded(tokens: Array, length: int, value: int) -> Array:
    """The tokens, cut or filled up to a length."""
    tokens = tokens[:, :length]
    return jnp.pad(tokens, ((0, 0), (0, length - tokens.shape[1])), constant_values=value)


def for_config(config: T5Config, z_loss: float = 0.0) -> EncoderDecoder | CTC:
    """The model of a configuration.

    Raises:
        ValueError: a z-loss for CTC, which has none; a speech encoder without a head.
    """
    if not isinstance(config, W2vBertConfig) or config.num_decoder_layers:
        return EncoderDecoder(config, z_loss)
    if z_loss:
        raise ValueError(f"the CTC loss has no z-loss: z_loss={z_loss}")
    return CTC(config)
