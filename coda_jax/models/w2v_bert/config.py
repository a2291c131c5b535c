"""w2v-BERT 2.0's configuration and the published sizes.

Axis letters: B batch, N frames, F features of a frame, C = 1 + F, V vocabulary.
"""

from collections.abc import Mapping
from typing import ClassVar

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from coda_jax import checks
from coda_jax.methods.base import Place
from coda_jax.models.base import Projection
from coda_jax.models.t5.config import T5Config
from coda_jax.nn.tokens import split_frames


@struct.dataclass
class W2vBertConfig(T5Config):
    """Sizes and options of a w2v-BERT 2.0, and of the T5 decoder on it if there is one.

    Encoder and decoder share the sizes that both have. What only a decoder has, like the number of
    buckets of its relative positions, is not used without one.

    Attributes:
        vocab_size: V; 0 for an encoder without a CTC head.
        num_decoder_layers: layers of the T5 decoder; 0 for a CTC head instead.
        feature_dim: F.
        conv_width: W, how many frames the convolution sees.
        max_left_distance: from how many frames before the query on all keys share a vector.
        max_right_distance: the same behind the query.
        blank_id: the token of the CTC head that means no token.
    """

    family: ClassVar[str] = "wav2vec2-bert"
    heads: ClassVar[tuple[str, ...]] = (r"^ctc_head/",)
    head_fields: ClassVar[tuple[str, ...]] = ("vocab_size", "blank_id")
    head_kinds: ClassVar[tuple[str, ...]] = ()
    blocks: ClassVar[Mapping[str, Mapping[str, str]]] = {
        **T5Config.blocks,
        "encoder": {"first_mlp": "mlp_dim", "attention": "num_heads", "second_mlp": "mlp_dim"},
    }
    biased: ClassVar[tuple[str, ...]] = ("self_attention",)
    field_checks: ClassVar[Mapping[str, checks.Check]] = {
        **T5Config.field_checks,
        **dict.fromkeys(("feature_dim", "conv_width"), checks.COUNT),
        **dict.fromkeys(("max_left_distance", "max_right_distance", "blank_id"), checks.Whole(0)),
        "vocab_size": checks.Whole(0),
    }

    emb_dim: int = 1024
    num_heads: int = 16
    num_encoder_layers: int = 24
    num_decoder_layers: int = 0
    mlp_dim: int = 4096
    layer_norm_epsilon: float = 1e-5
    feature_dim: int = 160
    conv_width: int = 31
    max_left_distance: int = 64
    max_right_distance: int = 8
    blank_id: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.num_decoder_layers:
            checks.fields(self, vocab_size=checks.COUNT)
        if self.blank_id >= max(self.vocab_size, 1):
            raise ValueError(
                f"W2vBertConfig.blank_id must be below vocab_size={self.vocab_size}, "
                f"got {self.blank_id}"
            )

    @property
    def lacks_head(self) -> bool:
        """Whether there is neither a CTC head nor a decoder."""
        return not self.vocab_size

    def network(self) -> nn.Module:
        """`SpeechToText` where there is a decoder, else `SpeechCTC`."""
        from coda_jax.models.w2v_bert import network  # which reads this class

        return network.SpeechToText(self) if self.num_decoder_layers else network.SpeechCTC(self)

    def input_spec(self, batch: int, length: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the encoder's inputs, [B, N, C] float32 frames."""
        return jax.ShapeDtypeStruct((batch, length, 1 + self.feature_dim), jnp.float32)

    def init_inputs(self) -> tuple[Array, ...]:
        """Arguments with which the network makes its parameters."""
        frames, *tokens = super().init_inputs()
        return (frames, *tokens) if self.num_decoder_layers else split_frames(frames)

    def projections(self, place: Place) -> tuple[Projection, ...]:
        """The frozen matrices of a layer; its first feed-forward is for all that is attended to."""
        if place.stack == "decoder":
            return super().projections(place)
        width = self.emb_dim
        first, second = (self.size_of(place, f"{name}_mlp") for name in ("first", "second"))
        return (
            Projection("first_mlp/wi", width, first, "context"),
            Projection("first_mlp/wo", first, width, "context"),
            *self._attention(place, "attention", "context"),
            Projection("convolution/wi", width, 2 * width),
            Projection("convolution/wo", width, width),
            Projection("second_mlp/wi", width, second),
            Projection("second_mlp/wo", second, width),
        )

    def mixing_flops(self, place: Place, tokens: int, context: int) -> float:
        """Logits, those of the distances too, and weighted sums; the convolution by channel."""
        flops = super().mixing_flops(place, tokens, context)
        if place.stack == "decoder":
            return flops
        distances = self.max_left_distance + 1 + self.max_right_distance
        flops += 2 * tokens * self.size_of(place, "attention") * self.head_dim * distances
        return flops + 2 * tokens * self.emb_dim * self.conv_width

    def output_flops(self, inputs: int, targets: int) -> float:
        """The logits of T outputs of the decoder, or of the N frames."""
        places = targets if self.num_decoder_layers else inputs
        return 2 * places * self.emb_dim * self.vocab_size

    def input_flops(self, length: int) -> float:
        """The projection of N frames."""
        return 2 * length * self.feature_dim * self.emb_dim


def _sizes(emb_dim, num_heads, num_encoder_layers, mlp_dim, conv_width=31):
    return {
        "emb_dim": emb_dim,
        "num_heads": num_heads,
        "num_encoder_layers": num_encoder_layers,
        "mlp_dim": mlp_dim,
        "conv_width": conv_width,
    }


PRESETS = {  # with a CTC head for bytes, as `audio_folder` and the tasks of LibriSpeech have
    "w2v_bert_base": W2vBertConfig(384, **_sizes(768, 12, 12, 3072)),
    "w2v_bert_large": W2vBertConfig(384, **_sizes(1024, 16, 24, 4096)),  # as published
    "w2v_bert_tiny": W2vBertConfig(384, **_sizes(128, 2, 4, 384, conv_width=15)),  # bundled
}
TINY = W2vBertConfig(  # for tests and examples
    20,
    head_dim=8,
    mlp_activations=("gelu", "linear"),
    relpos_num_buckets=8,
    relpos_max_distance=16,
    feature_dim=6,
    max_left_distance=5,
    max_right_distance=2,
    **_sizes(16, 2, 2, 24, conv_width=4),
)
