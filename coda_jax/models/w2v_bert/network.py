"""Speech to text: w2v-BERT 2.0's Conformer encoder with conditional layers, and what reads it.

On top is a CTC head (`SpeechCTC`) or the decoder of the text family (`SpeechToText`).

A conditional layer takes the selected frames, in the order of time, through the whole frozen layer.
Attention sees how far apart they truly are. The convolution runs over the selected frames as over
neighbours: it mixes the W frames that the router found worth it, and its cost falls with the
reduction. The alternative is to run it over all frames, those not selected as they entered the
layer, at the full cost of its projections: of a layer's products, it alone would then not fall with
the reduction. It learns sooner: after 600 steps of runs/pretrain_spoken_digits_coda.gin from the
bundled dense checkpoint (r = 4, one seed) 96.4 % of the validation recordings are right, and 87.0 %
with the selected frames alone, which reach 99.2 % in the 4,000 steps of the bundled model's card.

The router and the adapter read u = the layer's first norm, that of the first feed-forward block.
Frames that are attended to but not selected (`k_to_all`) go through that block too, which is what
the attention of the dense layer sees of them.

Axis letters: B batch, N frames, F features of a frame, C = 1 + F, D embedding, V vocabulary.
"""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.methods.base import Place, conditional_layer, routed
from coda_jax.models.t5.network import Transformer
from coda_jax.models.w2v_bert.config import W2vBertConfig
from coda_jax.nn import layers
from coda_jax.nn.convolution import Convolution
from coda_jax.nn.layers import LayerNorm
from coda_jax.nn.relative_keys import RelativeKeyAttention
from coda_jax.nn.remat import rematerialised
from coda_jax.nn.tokens import Selection, Tokens, join_frames, split_frames, take


class FeatureProjection(nn.Module):
    """Features as vectors: W norm(features) + bias."""

    config: W2vBertConfig

    @nn.compact
    def __call__(self, features: Float[Array, "b n f"]) -> Float[Array, "b n d"]:
        """[B, N, F] -> [B, N, D]."""
        cfg = self.config
        x = LayerNorm(cfg.layer_norm_epsilon, cfg.dtype, name="layer_norm")(features)
        # "mlp" is T5X's name of an axis that is summed over; it has none for features.
        return layers.Dense(
            cfg.emb_dim, ("mlp", "embed"), use_bias=True, dtype=cfg.dtype, name="projection"
        )(x)


def _mlp(cfg: W2vBertConfig, place: Place, name: str) -> layers.MlpBlock:
    size = cfg.size_of(place, name)
    return layers.MlpBlock(
        size, ("swish",), cfg.dropout_rate, use_bias=True, dtype=cfg.dtype, name=name
    )


class ConformerLayer(nn.Module):
    """A Conformer layer: two half feed-forwards around attention and convolution."""

    config: W2vBertConfig
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
        dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,), deterministic=deterministic)
        attention = RelativeKeyAttention(
            cfg.size_of(place, "attention"),
            cfg.head_dim,
            cfg.max_left_distance,
            cfg.max_right_distance,
            cfg.dropout_rate,
            cfg.float32_attention_logits,
            cfg.dtype,
            name="attention",
        )
        convolution = Convolution(
            cfg.conv_width, cfg.layer_norm_epsilon, cfg.dtype, name="convolution"
        )
        first_norm, attention_norm, second_norm, final_norm = (
            LayerNorm(cfg.layer_norm_epsilon, cfg.dtype, name=f"{name}_layer_norm")
            for name in ("pre_first_mlp", "pre_attention", "pre_second_mlp", "final")
        )
        first_mlp, second_mlp = (_mlp(cfg, place, name) for name in ("first_mlp", "second_mlp"))

        def layer(tokens: Tokens, context: Tokens) -> Array:
            seen = context.x + 0.5 * dropout(first_mlp(context.u, deterministic))
            h = seen if tokens is context else take(seen, tokens.positions)
            h += dropout(
                attention(
                    attention_norm(h),
                    attention_norm(seen),
                    tokens.visible(context),
                    tokens.positions,
                    context.positions,
                    deterministic=deterministic,
                )
            )
            h += dropout(convolution(h, tokens.mask, tokens.segment_ids))
            h += 0.5 * dropout(second_mlp(second_norm(h), deterministic))
            return final_norm(h)

        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        tokens = Tokens(x, first_norm(x), positions, mask, segment_ids)
        tokens = routed(cfg.methods, tokens, place)
        return conditional_layer(cfg.methods, layer, place)(tokens, tokens), tokens.selection


class ConformerEncoder(nn.Module):
    """The stack of Conformer layers over [B, N, C] frames."""

    config: W2vBertConfig

    @nn.compact
    def __call__(
        self,
        frames: Float[Array, "b n c"],
        mask: Bool[Array, "b n"],
        segment_ids: Int[Array, "b n"] | None = None,
        deterministic: bool = False,
    ) -> tuple[Float[Array, "b n d"], Selection | None]:
        """Frames [B, N, C] -> ([B, N, D], what the last layer selected)."""
        cfg = self.config
        features, _ = split_frames(frames)
        x = FeatureProjection(cfg, name="feature_projection")(features)
        x = jnp.where(mask[..., None], x, 0)
        x = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(x, deterministic=deterministic)
        layer = rematerialised(ConformerLayer, cfg.remat_policy, static_argnums=(4,))
        for i in range(cfg.num_encoder_layers):
            made = layer(cfg, i, name=f"layers_{i}")
            x, selection = made(x, mask, segment_ids, deterministic)
        return x, selection


class SpeechToText(Transformer):
    """The Conformer encoder and the T5 decoder, called as T5X calls its network.

    `encoder_input_tokens` is [B, N, C] float32, the frames of `join_frames`.
    """

    config: W2vBertConfig

    def make_encoder(self) -> ConformerEncoder:
        """The encoder, as `setup` attaches it."""
        return ConformerEncoder(self.config)

    @staticmethod
    def input_mask(encoder_input_tokens: Float[Array, "b n c"]) -> Bool[Array, "b n"]:
        """False for padding, whose channel 0 is 0."""
        return split_frames(encoder_input_tokens)[1]


class SpeechCTC(nn.Module):
    """The Conformer encoder with a CTC head: for each frame a token or none.

    Reference: Barrault et al. 2023, Seamless, arXiv 2312.05187 (w2v-BERT 2.0); Graves et al. 2006,
    Connectionist Temporal Classification.
    """

    config: W2vBertConfig

    # The encoder is called as that of an encoder-decoder.
    input_mask = staticmethod(SpeechToText.input_mask)
    encode = SpeechToText.encode

    def setup(self):
        cfg = self.config
        self.encoder = ConformerEncoder(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate)
        if cfg.vocab_size:
            self.ctc_head = layers.Dense(
                cfg.vocab_size, ("embed", "vocab"), use_bias=True, dtype=jnp.float32
            )

    def __call__(
        self,
        features: Float[Array, "b n f"],
        feature_mask: Bool[Array, "b n"],
        *,
        enable_dropout: bool = True,
    ) -> Float[Array, "b n v"]:
        """Logits of the tokens of each frame, [B, N, V] float32.

        Args:
            features: [B, N, F].
            feature_mask: [B, N], False for padding.
            enable_dropout: needs the RNG "dropout".

        Returns:
            The logits; without a head (vocab_size 0) the encoder's output, [B, N, D].

        Raises:
            ValueError: F is not the config's.
        """
        frames = join_frames(features, feature_mask)
        encoded = self.encode(frames, enable_dropout=enable_dropout)
        if not self.config.vocab_size:
            return encoded
        return self.ctc_head(self.dropout(encoded, deterministic=not enable_dropout))
