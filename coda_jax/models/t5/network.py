"""T5: encoder-decoder Transformer with T5X's call signatures and parameter tree.

Each layer is a function of its tokens, around which the config's methods are put; without methods
this is T5 itself. Other families have the same layers and decoder over inputs of their own, where a
token is a vector of C values.

Axis letters: B batch, N input tokens, T target tokens, C channels, D embedding, V vocabulary.
"""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.methods.base import Place, applied_to_modules, conditional_layer, routed
from coda_jax.methods.cross_attention import encoding_read, segments_read
from coda_jax.models.t5.config import T5Config
from coda_jax.nn import attention as attentions
from coda_jax.nn import layers, position_bias
from coda_jax.nn.remat import rematerialised
from coda_jax.nn.tokens import Selection, Tokens
from coda_jax.nn.visibility import Visibility

# What a decoder's cache holds for the attention to the encoding.
_OF_ENCODING = ("encoded_key", "encoded_value", *attentions.MATRICES)


def _norm(cfg: T5Config, name: str) -> layers.RMSNorm:
    return layers.RMSNorm(cfg.layer_norm_epsilon, cfg.dtype, name=name)


def _attention(cfg: T5Config, place: Place, name: str) -> attentions.Attention:
    return attentions.Attention(
        cfg.size_of(place, name),
        cfg.head_dim,
        cfg.dropout_rate,
        cfg.float32_attention_logits,
        cfg.dtype,
        name=name,
    )


def _mlp(cfg: T5Config, place: Place) -> layers.MlpBlock:
    size = cfg.size_of(place, "mlp")
    return layers.MlpBlock(size, cfg.mlp_activations, cfg.dropout_rate, cfg.dtype, name="mlp")


def _relpos_bias(
    cfg: T5Config, num_heads: int, bidirectional: bool
) -> position_bias.RelativePositionBiases:
    sizes = cfg.relpos_num_buckets, cfg.relpos_max_distance, num_heads, bidirectional
    return position_bias.RelativePositionBiases(*sizes, cfg.dtype, name="relpos_bias")


def _dropout(cfg: T5Config, deterministic: bool) -> nn.Dropout:
    return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,), deterministic=deterministic)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward on the tokens that the methods let through.

    Attributes:
        config: sizes, options and methods.
        shared_bias: the bias that all layers share; None for one of its own, or none.
        layer_index: from 0.
    """

    config: T5Config
    shared_bias: nn.Module | None
    layer_index: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b n"],
        segment_ids: Int[Array, "b n"] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "b n d"], Selection | None]:
        """[B, N, D] -> ([B, N, D], what was selected); `mask` is False for padding."""
        cfg = self.config
        place = Place("encoder", self.layer_index, cfg.num_encoder_layers)
        attention, mlp = _attention(cfg, place, "attention"), _mlp(cfg, place)
        mlp_norm = _norm(cfg, "pre_mlp_layer_norm")
        relpos_bias = self.shared_bias
        if "attention" in cfg.biased and not cfg.shared_relpos_bias:
            relpos_bias = _relpos_bias(cfg, attention.num_heads, bidirectional=True)
        dropout = _dropout(cfg, deterministic)

        def layer(tokens: Tokens, context: Tokens) -> Array:
            bias = None
            if relpos_bias is not None:
                bias = relpos_bias(tokens.positions, context.positions)
            y = attention(
                tokens.u,
                attention.keys_values(context.u),
                tokens.visible(context),
                bias,
                deterministic=deterministic,
            )
            h = tokens.x + dropout(y)
            return h + dropout(mlp(mlp_norm(h), deterministic))

        norm = _norm(cfg, "pre_attention_layer_norm")
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        tokens = routed(cfg.methods, Tokens(x, norm(x), positions, mask, segment_ids), place)
        return conditional_layer(cfg.methods, layer, place)(tokens, tokens), tokens.selection


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, feed-forward.

    Attributes:
        config: sizes, options and methods.
        shared_bias: the bias that all layers share; None for one of its own.
        layer_index: from 0.
    """

    config: T5Config
    shared_bias: nn.Module | None
    layer_index: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        encoded: Float[Array, "r n d"],
        self_mask: Visibility | Bool[Array, "r 1 m l"] | None,
        cross_mask: Visibility | None,
        deterministic: bool,
        decode: bool,
        cache_encoded: bool,
        tree: Bool[Array, "t t"] | None,
    ) -> Float[Array, "b t d"]:
        """[B, T, D] -> [B, T, D]; see `Transformer.decode` for R, the cache and the tree."""
        cfg = self.config
        place = Place("decoder", self.layer_index, cfg.num_decoder_layers)
        relpos_bias = self.shared_bias
        if not cfg.shared_relpos_bias:
            relpos_bias = _relpos_bias(cfg, cfg.size_of(place, "self_attention"), False)
        dropout = _dropout(cfg, deterministic)

        def self_attention(u):
            attention = _attention(cfg, place, "self_attention")
            key, value = attention.keys_values(u)
            query_positions = jnp.arange(u.shape[1], dtype=jnp.int32)[None]
            if decode:
                key, value, query_positions = attentions.KeyValueCache(name="cache")(key, value)
            positions, visible = attentions.causal(query_positions, key.shape[2], tree, self_mask)
            bias = relpos_bias(*positions)
            if decode and self_mask is not None:  # of beams
                num_beams = self_mask.shape[-1] // key.shape[2]
                key, value = (attentions.join_beams(x, num_beams) for x in (key, value))
                bias = bias.tile(num_beams)
            return attention(u, (key, value), visible, bias, deterministic=deterministic)

        def cross_attention(q):
            attention = _attention(cfg, place, "encoder_decoder_attention")
            source = None
            if self.has_variable("cache", "encoded_key"):
                key, value, *matrices = (self.get_variable("cache", name) for name in _OF_ENCODING)
                source = None if matrices[0] is None else (encoded, *matrices)  # see OwnLeaves
            else:
                key, value = attention.keys_values(encoded)
                if cache_encoded:
                    matrices = attention.matrices(encoded.shape[-1])
                    for name, array in zip(_OF_ENCODING, (key, value, *matrices), strict=True):
                        self.put_variable("cache", name, array)
            return attention(
                q, (key, value), cross_mask, source=source, deterministic=deterministic
            )

        def layer(tokens: Tokens, context: Tokens) -> Array:
            del context  # each token sees those before it, which may be in the cache
            h = tokens.x + dropout(self_attention(tokens.u))
            h += dropout(cross_attention(_norm(cfg, "pre_cross_attention_layer_norm")(h)))
            mlp_norm = _norm(cfg, "pre_mlp_layer_norm")
            return h + dropout(_mlp(cfg, place)(mlp_norm(h), deterministic))

        norm = _norm(cfg, "pre_self_attention_layer_norm")
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        tokens = Tokens(x, norm(x), positions, jnp.ones(x.shape[:2], bool))
        return conditional_layer(cfg.methods, layer, place)(tokens, tokens)


class Encoder(nn.Module):
    """The stack of encoder layers.

    Attributes:
        config: sizes and options.
        embedding: the inputs as vectors, [B, N] or [B, N, C] -> [B, N, D].
    """

    config: T5Config
    embedding: nn.Module

    @nn.compact
    def __call__(
        self,
        encoder_input_tokens: Int[Array, "b n"] | Float[Array, "b n c"],
        mask: Bool[Array, "b n"],
        segment_ids: Int[Array, "b n"] | None = None,
        deterministic: bool = False,
    ) -> tuple[Float[Array, "b n d"], Selection | None]:
        """Inputs [B, N] or [B, N, C] -> ([B, N, D], what the last layer selected)."""
        cfg = self.config
        dropout = _dropout(cfg, deterministic)
        shared = "attention" in cfg.biased and cfg.shared_relpos_bias
        shared_bias = _relpos_bias(cfg, cfg.num_heads, bidirectional=True) if shared else None
        x = dropout(self.embedding(encoder_input_tokens))
        layer = rematerialised(EncoderLayer, cfg.remat_policy, static_argnums=(4,))
        for i in range(cfg.num_encoder_layers):
            made = layer(cfg, shared_bias, i, name=f"layers_{i}")
            x, selection = made(x, mask, segment_ids, deterministic)
        x = _norm(cfg, "encoder_norm")(x).array()
        return nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic), selection


class Decoder(nn.Module):
    """The stack of decoder layers and the output layer.

    Attributes:
        config: sizes, options and methods.
        shared_embedding: of the tokens.
    """

    config: T5Config
    shared_embedding: nn.Module

    @nn.compact
    def __call__(
        self,
        encoded: Float[Array, "r n d"],
        decoder_input_tokens: Int[Array, "b t"],
        self_mask: Visibility | Bool[Array, "r 1 m l"] | None = None,
        cross_mask: Visibility | None = None,
        deterministic: bool = False,
        decode: bool = False,
        cache_encoded: bool = False,
        tree: Bool[Array, "t t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Tokens [B, T] -> logits [B, T, V] float32; see `Transformer.decode`."""
        cfg = self.config
        dropout = _dropout(cfg, deterministic)
        shared_bias = None
        if cfg.shared_relpos_bias:
            shared_bias = _relpos_bias(cfg, cfg.num_heads, bidirectional=False)
        y = dropout(self.shared_embedding(decoder_input_tokens))
        layer = rematerialised(DecoderLayer, cfg.remat_policy, static_argnums=(5, 6, 7))
        for i in range(cfg.num_decoder_layers):
            made = layer(cfg, shared_bias, i, name=f"layers_{i}")
            y = made(y, encoded, self_mask, cross_mask, deterministic, decode, cache_encoded, tree)
        y = dropout(_norm(cfg, "decoder_norm")(y).array())
        self.sow("intermediates", "states", y)
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

    def input_mask(self, encoder_input_tokens: Int[Array, "b n"]) -> Bool[Array, "b n"]:
        """False for padding."""
        return encoder_input_tokens != self.config.pad_id

    def encode(
        self,
        encoder_input_tokens: Int[Array, "b n"] | Float[Array, "b n c"],
        encoder_segment_ids: Int[Array, "b n"] | None = None,
        enable_dropout: bool = True,
        every_token: bool = False,
    ) -> Float[Array, "b k d"]:
        """The encoder's output, [B, N, D], or [B, K, D] where the decoder reads selected tokens.

        Args:
            encoder_input_tokens: as `config.input_spec` says; for T5 [B, N] int32, 0 for padding.
            encoder_segment_ids: [B, N], 1..S for packed examples, 0 for padding; None if unpacked.
            enable_dropout: needs the RNG "dropout".
            every_token: whether it is [B, N, D] whatever the decoder reads.

        Raises:
            ValueError: the inputs are another family's.
        """
        channels = self.config.input_spec(1, 1).shape[2:]
        if encoder_input_tokens.shape[2:] != channels:
            raise ValueError(
                f"{self.config.family} takes inputs [B, N, *{channels}], got the shape "
                f"{encoder_input_tokens.shape}"
            )
        with applied_to_modules(self.config.methods):
            encoded, selection = self.encoder(
                encoder_input_tokens,
                self.input_mask(encoder_input_tokens),
                encoder_segment_ids,
                deterministic=not enable_dropout,
            )
        read = None if every_token else selection
        return encoding_read(self.config, encoded, read, encoder_segment_ids)

    def decode(
        self,
        encoded: Float[Array, "r k d"],
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
        ancestors: Int[Array, "r m l"] | None = None,
        tree: Bool[Array, "t t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Logits, [B, T, V] float32.

        Args:
            encoded: of `encode`, of B rows, or in cached decoding of R rows with B = R * beams.
            encoder_input_tokens: of B or R rows; says what is padding.
            decoder_input_tokens: [B, T], the targets shifted right; one token a step with a cache.
            decoder_target_tokens: [B, T]; says what is padding.
            encoder_segment_ids: [B, N] for packed examples.
            decoder_segment_ids: [B, T] for packed examples.
            enable_dropout: needs the RNG "dropout".
            decode: makes the cache, a mutable collection, and from then on uses it.
            decoder_positions, max_decode_length: not used; part of T5X's signature.
            cache_encoded: keep keys, values and matrices of `encoded` in the cache that is made.
            ancestors: [R, M, L] for the M beams of a row in cached decoding: which of them wrote
                what each sees at each place of the cache. Without it each sees what it wrote.
            tree: [T, T] where several targets share their beginnings: what each token sees, itself
                and the tokens of its own target before it. Without it these are all before it.
        """
        del decoder_positions, max_decode_length
        if decode and encoder_segment_ids is not None:
            raise ValueError("packed examples cannot be decoded: encoder_segment_ids was given")
        mask = self.input_mask(encoder_input_tokens)
        read = segments_read(self.config, mask, encoder_segment_ids)
        packed = encoder_segment_ids is not None
        of_targets, of_inputs = (decoder_segment_ids, read) if packed else (None, None)
        cross_mask = Visibility(read > 0, of_targets, of_inputs)
        self_mask = None if ancestors is None else attentions.beams_mask(ancestors)
        if not decode:
            written = decoder_target_tokens != self.config.pad_id
            self_mask = Visibility(written, of_targets, of_targets)
        with applied_to_modules(self.config.methods):
            return self.decoder(
                encoded,
                decoder_input_tokens,
                self_mask,
                cross_mask,
                deterministic=not enable_dropout,
                decode=decode,
                cache_encoded=cache_encoded,
                tree=tree,
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
            *(encoder_input_tokens, decoder_input_tokens, decoder_target_tokens),
            *(encoder_segment_ids, decoder_segment_ids, decoder_positions),
            enable_dropout,
            decode,
        )
