"""T5: encoder-decoder Transformer with T5X's call signatures and parameter tree.

The encoder's layers are conditional where the config says so; the decoder is dense. Both get an
adapter beside each layer. Without `adapter` and `coda` this is T5 itself. Other families (`vision`)
have the same layers and decoder over inputs of their own, where a token is a vector of C values.

Axis letters: B batch, N input tokens, T target tokens, C channels, D embedding, V vocabulary.
"""

import dataclasses
from typing import Any, ClassVar

from flax import linen as nn
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax import layers
from coda_jax.adapters import Adapter, AdapterConfig
from coda_jax.conditional import conditional
from coda_jax.routing import CodaConfig, Tokens


@struct.dataclass
class T5Config:
    """Sizes and options of a T5 model.

    A family's configuration says what its network is and what its inputs look like, which is all
    that the trainer and the checkpoints ask of it.

    Attributes:
        family: name of the model family, the same for all its models.
        vocab_size: V, rows of the embedding.
        dtype: of the computation.
        emb_dim: D.
        num_heads: attention heads.
        num_encoder_layers: layers of the encoder.
        num_decoder_layers: layers of the decoder.
        head_dim: width of a head.
        mlp_dim: hidden width of the feed-forward block.
        mlp_activations: ("relu",) for T5 1.0, ("gelu", "linear") for v1.1 and later.
        dropout_rate: used where `enable_dropout` is set.
        logits_via_embedding: whether the output layer is the embedding (T5 1.0).
        float32_attention_logits: whether attention logits are float32 whatever `dtype` is.
        relpos_num_buckets: buckets of the relative position bias.
        relpos_max_distance: distance from which on all share a bucket.
        layer_norm_epsilon: of the layer norms.
        adapter: the adapter beside each layer, or None for none.
        coda: the routing of the encoder's layers, or None for dense layers.
    """

    family: ClassVar[str] = "t5"

    vocab_size: int
    dtype: Any = jnp.float32
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: tuple[str, ...] = ("relu",)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False
    relpos_num_buckets: int = 32
    relpos_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    adapter: AdapterConfig | None = None
    coda: CodaConfig | None = None

    def __post_init__(self):
        if self.coda is not None:
            given = len(self.coda.reductions(self.num_encoder_layers))
            if given != self.num_encoder_layers:
                raise ValueError(
                    f"CodaConfig.reduction has {given} entries for "
                    f"{self.num_encoder_layers} encoder layers"
                )

    def dense(self) -> "T5Config":
        """The same model without adapters and routing."""
        return dataclasses.replace(self, adapter=None, coda=None)

    def network(self) -> "Transformer":
        """The network of this configuration."""
        return Transformer(self)

    def input_spec(self, batch: int, length: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the encoder's inputs, [B, N] int32 token ids."""
        return jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def init_inputs(self) -> tuple[Array, ...]:
        """Arguments with which the network makes its parameters."""
        spec = self.input_spec(1, 2)  # parameters do not depend on batch or length
        tokens = jnp.ones((1, 2), jnp.int32)
        return jnp.ones(spec.shape, spec.dtype), tokens, tokens


def _norm(cfg: T5Config, name: str) -> layers.LayerNorm:
    return layers.LayerNorm(cfg.layer_norm_epsilon, cfg.dtype, name=name)


def _attention(cfg: T5Config, name: str) -> layers.Attention:
    return layers.Attention(
        cfg.num_heads,
        cfg.head_dim,
        cfg.dropout_rate,
        cfg.float32_attention_logits,
        cfg.dtype,
        name=name,
    )


def _mlp(cfg: T5Config) -> layers.MlpBlock:
    return layers.MlpBlock(
        cfg.mlp_dim, cfg.mlp_activations, cfg.dropout_rate, cfg.dtype, name="mlp"
    )


def _relpos_bias(cfg: T5Config, bidirectional: bool) -> layers.RelativePositionBiases:
    return layers.RelativePositionBiases(
        cfg.relpos_num_buckets,
        cfg.relpos_max_distance,
        cfg.num_heads,
        bidirectional,
        cfg.dtype,
        name="relpos_bias",
    )


def _dropout(cfg: T5Config, deterministic: bool) -> nn.Dropout:
    return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,), deterministic=deterministic)


class EncoderLayer(nn.Module):
    """A conditional encoder layer: self-attention and feed-forward on the selected tokens."""

    config: T5Config
    relpos_bias: nn.Module | None
    layer_index: int

    @nn.compact
    def __call__(self, x, mask, segment_ids, deterministic):
        cfg = self.config
        attention, mlp = _attention(cfg, "attention"), _mlp(cfg)
        mlp_norm = _norm(cfg, "pre_mlp_layer_norm")
        dropout = _dropout(cfg, deterministic)

        def layer(tokens: Tokens, context: Tokens) -> Array:
            bias = None
            if self.relpos_bias is not None:
                bias = self.relpos_bias(tokens.positions, context.positions)
            y = attention(
                tokens.u,
                attention.keys_values(context.u),
                tokens.visible(context),
                bias,
                deterministic=deterministic,
            )
            h = tokens.x + dropout(y)
            return h + dropout(mlp(mlp_norm(h), deterministic))

        u = _norm(cfg, "pre_attention_layer_norm")(x)
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        tokens = Tokens(x, u, positions, mask, segment_ids)
        return conditional(layer, tokens, cfg.adapter, cfg.coda, self.layer_index)


class KeyValueCache(nn.Module):
    """The keys and values of the tokens decoded so far.

    The first call, with arrays of the full length, makes an empty cache and returns its input.
    Each later call brings one position, which is written at the index.
    """

    @nn.compact
    def __call__(self, key, value):
        """(key, value [B, H, L, head_dim], positions of the queries [1, Q])."""
        exists = self.has_variable("cache", "cached_key")
        cached_key = self.variable("cache", "cached_key", jnp.zeros_like, key)
        cached_value = self.variable("cache", "cached_value", jnp.zeros_like, value)
        index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        if not exists:
            return key, value, jnp.arange(key.shape[2], dtype=jnp.int32)[None]
        if key.shape[2] != 1:
            raise ValueError(f"cached decoding takes one token a step, got {key.shape[2]}")
        start = (0, 0, index.value, 0)
        cached_key.value = lax.dynamic_update_slice(cached_key.value, key, start)
        cached_value.value = lax.dynamic_update_slice(cached_value.value, value, start)
        position = index.value[None, None]
        index.value += 1
        return cached_key.value, cached_value.value, position


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, feed-forward, and an adapter."""

    config: T5Config
    relpos_bias: nn.Module

    @nn.compact
    def __call__(self, x, encoded, self_mask, cross_mask, deterministic, decode, cache_encoded):
        cfg = self.config
        dropout = _dropout(cfg, deterministic)

        u = _norm(cfg, "pre_self_attention_layer_norm")(x)
        attention = _attention(cfg, "self_attention")
        key, value = attention.keys_values(u)
        query_positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        if decode:
            key, value, query_positions = KeyValueCache(name="cache")(key, value)
        key_positions = jnp.arange(key.shape[2], dtype=jnp.int32)[None]
        visible = (key_positions[:, None, :] <= query_positions[:, :, None])[:, None]
        if self_mask is not None:
            visible &= self_mask
        bias = self.relpos_bias(query_positions, key_positions)
        h = x + dropout(attention(u, (key, value), visible, bias, deterministic=deterministic))

        attention = _attention(cfg, "encoder_decoder_attention")
        if self.has_variable("cache", "encoded_key"):
            key, value = (self.get_variable("cache", f"encoded_{n}") for n in ("key", "value"))
        else:
            key, value = attention.keys_values(encoded)
            if cache_encoded:
                self.put_variable("cache", "encoded_key", key)
                self.put_variable("cache", "encoded_value", value)
        q = _norm(cfg, "pre_cross_attention_layer_norm")(h)
        h += dropout(attention(q, (key, value), cross_mask, deterministic=deterministic))

        y = h + dropout(_mlp(cfg)(_norm(cfg, "pre_mlp_layer_norm")(h), deterministic))
        if cfg.adapter is not None:
            y += Adapter(cfg.adapter, dtype=cfg.dtype, name="adapter")(u)
        return y


class Encoder(nn.Module):
    """The stack of encoder layers.

    Attributes:
        config: sizes and options.
        embedding: the inputs as vectors, [B, N, ...] -> [B, N, D].
        relative_positions: whether the layers share a relative position bias.
    """

    config: T5Config
    embedding: nn.Module
    relative_positions: bool = True

    @nn.compact
    def __call__(self, encoder_input_tokens, mask, segment_ids=None, deterministic=False):
        cfg = self.config
        dropout = _dropout(cfg, deterministic)
        relpos_bias = _relpos_bias(cfg, bidirectional=True) if self.relative_positions else None
        x = dropout(self.embedding(encoder_input_tokens))
        for i in range(cfg.num_encoder_layers):
            x = EncoderLayer(cfg, relpos_bias, i, name=f"layers_{i}")(
                x, mask, segment_ids, deterministic
            )
        x = _norm(cfg, "encoder_norm")(x)
        return nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)


class Decoder(nn.Module):
    """The stack of decoder layers and the output layer."""

    config: T5Config
    shared_embedding: nn.Module

    @nn.compact
    def __call__(
        self,
        encoded,
        decoder_input_tokens,
        self_mask=None,
        cross_mask=None,
        deterministic=False,
        decode=False,
        cache_encoded=False,
    ):
        cfg = self.config
        dropout = _dropout(cfg, deterministic)
        relpos_bias = _relpos_bias(cfg, bidirectional=False)
        y = dropout(self.shared_embedding(decoder_input_tokens))
        for i in range(cfg.num_decoder_layers):
            y = DecoderLayer(cfg, relpos_bias, name=f"layers_{i}")(
                y, encoded, self_mask, cross_mask, deterministic, decode, cache_encoded
            )
        y = dropout(_norm(cfg, "decoder_norm")(y))
        if cfg.logits_via_embedding:
            # Brings the logits of the shared embedding, whose entries have unit scale, to order 1.
            return self.shared_embedding.attend(y * cfg.emb_dim**-0.5)
        return layers.Dense(
            cfg.vocab_size, ("embed", "vocab"), dtype=jnp.float32, name="logits_dense"
        )(y)


class Transformer(nn.Module):
    """T5, called as T5X calls its network.

    What `encoder_input_tokens` is differs by family; each defines `make_encoder` and `input_mask`.
    """

    config: T5Config

    def setup(self):
        cfg = self.config
        self.shared_embedding = layers.Embed(
            cfg.vocab_size, cfg.emb_dim, cfg.dtype, name="token_embedder"
        )
        self.encoder = self.make_encoder()
        self.decoder = Decoder(cfg, self.shared_embedding)

    def make_encoder(self) -> Encoder:
        """The encoder, as `setup` attaches it."""
        return Encoder(self.config, self.shared_embedding)

    @staticmethod
    def input_mask(encoder_input_tokens: Int[Array, "b n"]) -> Bool[Array, "b n"]:
        """False for padding."""
        return encoder_input_tokens > 0

    def encode(
        self,
        encoder_input_tokens: Int[Array, "b n"] | Float[Array, "b n c"],
        encoder_segment_ids: Int[Array, "b n"] | None = None,
        enable_dropout: bool = True,
    ) -> Float[Array, "b n d"]:
        """The encoder's output, [B, N, D].

        Args:
            encoder_input_tokens: as the config's `input_spec` says; [B, N] int32 for T5, 0 for
                padding.
            encoder_segment_ids: [B, N], 1..S for packed examples, 0 for padding; None if unpacked.
            enable_dropout: needs the RNG "dropout".

        Raises:
            ValueError: the inputs are another family's.
        """
        channels = self.config.input_spec(1, 1).shape[2:]
        if encoder_input_tokens.shape[2:] != channels:
            raise ValueError(
                f"{self.config.family} takes inputs [B, N, *{channels}], got the shape "
                f"{encoder_input_tokens.shape}"
            )
        return self.encoder(
            encoder_input_tokens,
            self.input_mask(encoder_input_tokens),
            encoder_segment_ids,
            deterministic=not enable_dropout,
        )

    def decode(
        self,
        encoded: Float[Array, "r n d"],
        encoder_input_tokens: Int[Array, "r n"] | Float[Array, "r n c"],
        decoder_input_tokens: Int[Array, "b t"],
        decoder_target_tokens: Int[Array, "b t"],
        encoder_segment_ids: Int[Array, "r n"] | None = None,
        decoder_segment_ids: Int[Array, "b t"] | None = None,
        decoder_positions: Int[Array, "b t"] | None = None,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
        cache_encoded: bool = False,
    ) -> Float[Array, "b t v"]:
        """Logits, [B, T, V] float32.

        Args:
            encoded: [B, N, D], or in cached decoding [R, N, D] with B = R * beams.
            encoder_input_tokens: of B or R rows; says what is padding.
            decoder_input_tokens: [B, T], the targets shifted right; one token a step with a cache.
            decoder_target_tokens: [B, T]; says what is padding.
            encoder_segment_ids: [B, N] for packed examples.
            decoder_segment_ids: [B, T] for packed examples.
            decoder_positions: not used, the biases are relative; part of T5X's signature.
            enable_dropout: needs the RNG "dropout".
            decode: makes the cache, a mutable collection, and from then on uses it.
            max_decode_length: not used, the cache knows its length; part of T5X's signature.
            cache_encoded: keep the keys and values of `encoded` in the cache that this call makes,
                for all later steps.
        """
        del decoder_positions, max_decode_length
        if decode and encoder_segment_ids is not None:
            raise ValueError("packed examples cannot be decoded: encoder_segment_ids was given")
        cross_mask = self.input_mask(encoder_input_tokens)[:, None, None, :]
        self_mask = None if decode else (decoder_target_tokens > 0)[:, None, None, :]
        if encoder_segment_ids is not None:
            segments = decoder_segment_ids[:, None, :, None]
            self_mask = self_mask & (segments == decoder_segment_ids[:, None, None, :])
            cross_mask = cross_mask & (segments == encoder_segment_ids[:, None, None, :])
        return self.decoder(
            encoded,
            decoder_input_tokens,
            self_mask,
            cross_mask,
            deterministic=not enable_dropout,
            decode=decode,
            cache_encoded=cache_encoded,
        )

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "b n"] | Float[Array, "b n c"],
        decoder_input_tokens: Int[Array, "b t"],
        decoder_target_tokens: Int[Array, "b t"],
        encoder_segment_ids: Int[Array, "b n"] | None = None,
        decoder_segment_ids: Int[Array, "b t"] | None = None,
        encoder_positions: Int[Array, "b n"] | None = None,
        decoder_positions: Int[Array, "b t"] | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
    ) -> Float[Array, "b t v"]:
        """Logits of the targets given the inputs, [B, T, V] float32; see `encode` and `decode`."""
        del encoder_positions
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            enable_dropout,
            decode,
        )


def init_params(module: nn.Module, rng: Array) -> dict[str, Any]:
    """The fresh parameter tree of a network."""
    return module.init(rng, *module.config.init_inputs(), enable_dropout=False)["params"]
