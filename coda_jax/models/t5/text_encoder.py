"""T5's encoder alone, with a head on its pooled outputs if there is one.

Axis letters: B batch, N input tokens, D embedding, C outputs of the head.
"""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coda_jax.models.t5.config import T5Config
from coda_jax.models.t5.network import Encoder, Transformer
from coda_jax.nn import layers
from coda_jax.nn.tokens import pool


class TextEncoder(nn.Module):
    """The encoder of a `Transformer`, as `T5EncoderModel` of transformers is.

    Attributes:
        config: sizes and options, without a decoder; `head` says how the outputs are read.
    """

    config: T5Config

    # The encoder is called as that of an encoder-decoder.
    input_mask = Transformer.input_mask
    encode = Transformer.encode

    def setup(self):
        cfg = self.config
        self.shared_embedding = layers.Embed(
            cfg.vocab_size, cfg.emb_dim, cfg.dtype, name="token_embedder"
        )
        self.encoder = Encoder(cfg, self.shared_embedding)
        if cfg.head is not None:
            self.dropout = nn.Dropout(cfg.dropout_rate)
            self.head = layers.Dense(
                cfg.num_outputs, ("embed", "vocab"), use_bias=True, dtype=jnp.float32
            )

    def __call__(
        self, encoder_input_tokens: Int[Array, "b n"], *, enable_dropout: bool = True
    ) -> Float[Array, "b ..."]:
        """What the head makes of the pooled outputs, [B, C] float32.

        Args:
            encoder_input_tokens: [B, N].
            enable_dropout: needs the RNG "dropout".

        Returns:
            The logits of the labels, or one number; without a head the outputs, [B, N, D].
        """
        cfg = self.config
        encoded = self.encode(encoder_input_tokens, enable_dropout=enable_dropout)
        if cfg.head is None:
            return encoded
        return self.read(encoded, encoder_input_tokens, enable_dropout=enable_dropout)

    def read(
        self,
        encoded: Float[Array, "b n d"],
        encoder_input_tokens: Int[Array, "b n"],
        *,
        enable_dropout: bool = True,
    ) -> Float[Array, "b c"]:
        """What the head makes of outputs of the encoder [B, N, D] and their inputs [B, N]."""
        pooled = pool(encoded, self.input_mask(encoder_input_tokens), self.config.pooling)
        return self.head(self.dropout(pooled, deterministic=not enable_dropout))
