"""T5's configuration, the published sizes, and the sizes that a parameter tree tells.

Axis letters: B batch, N input tokens, D embedding, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from coda_jax import checks, trees
from coda_jax.methods.base import Place
from coda_jax.models.base import ModelConfig, Projection
from coda_jax.nn.layers import ACTIVATIONS
from coda_jax.nn.tokens import POOLINGS


@struct.dataclass
class T5Config(ModelConfig):
    """Sizes and options of a T5 model, under the names of T5X's config where it has them.

    Attributes:
        biased: the attentions that have a relative position bias.
        num_heads: attention heads.
        head_dim: width of a head.
        mlp_dim: hidden width of the feed-forward block.
        mlp_activations: ("relu",) for T5 1.0, ("gelu", "linear") for v1.1 and later.
        logits_via_embedding: whether the output layer is the embedding (T5 1.0).
        float32_attention_logits: whether attention logits are float32 whatever `dtype` is.
        relpos_num_buckets: buckets of the relative position bias.
        relpos_max_distance: distance from which on all share a bucket.
        shared_relpos_bias: whether the layers of a stack share one bias; in umT5 each has its own.
        layer_norm_epsilon: of the layer norms.
        num_decoder_layers: layers of the decoder; 0 for a text encoder alone.
        head: of a text encoder: "classification", "regression", or None for its outputs.
        labels: the names of the classes.
        pooling: what the head reads of the outputs: their "mean", or the "first".
    """

    family: ClassVar[str] = "t5"
    heads: ClassVar[tuple[str, ...]] = (r"^head/",)
    head_fields: ClassVar[tuple[str, ...]] = ("head", "labels", "pooling")
    blocks: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "encoder": {"attention": "num_heads", "mlp": "mlp_dim"},
        "decoder": {
            "self_attention": "num_heads",
            "encoder_decoder_attention": "num_heads",
            "mlp": "mlp_dim",
        },
    }
    biased: ClassVar[tuple[str, ...]] = ("attention", "self_attention")
    head_kinds: ClassVar[tuple[str, ...]] = ("classification", "regression")
    field_checks: ClassVar[Mapping[str, checks.Check]] = {
        **ModelConfig.field_checks,
        **dict.fromkeys(("num_heads", "head_dim", "mlp_dim"), checks.COUNT),
        "mlp_activations": checks.Each(checks.OneOf(ACTIVATIONS), least=1),
        "relpos_num_buckets": checks.Whole(4),  # half of them for each direction
        "relpos_max_distance": checks.Whole(1, 1_000_000),
        "layer_norm_epsilon": checks.Number(above=0, most=1),
        **dict.fromkeys(
            ("logits_via_embedding", "float32_attention_logits", "shared_relpos_bias"), checks.flag
        ),
        "head": checks.Maybe(checks.text),
        "labels": checks.Each(checks.text),
        "pooling": checks.OneOf(POOLINGS),
    }

    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: tuple[str, ...] = ("relu",)
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False
    relpos_num_buckets: int = 32
    relpos_max_distance: int = 128
    shared_relpos_bias: bool = True
    layer_norm_epsilon: float = 1e-6
    head: str | None = None
    labels: tuple[str, ...] = ()
    pooling: str = "mean"

    def __post_init__(self):
        super().__post_init__()
        if self.head is not None and (self.num_decoder_layers or self.head not in self.head_kinds):
            raise ValueError(
                f"head={self.head!r} must be None, or one of {self.head_kinds} of an encoder alone "
                f"(num_decoder_layers={self.num_decoder_layers})"
            )
        if (self.head == "classification") != (len(set(self.labels)) > 1):
            raise ValueError(
                f"a head for classification, and no other, has labels, two or more: "
                f"head={self.head!r}, labels={self.labels!r}"
            )
        if self.relpos_max_distance <= self.relpos_num_buckets // 2:
            raise ValueError(
                f"{type(self).__name__}.relpos_max_distance must be above half of "
                f"relpos_num_buckets={self.relpos_num_buckets}, got {self.relpos_max_distance}"
            )

    def _check_layer_sizes(self):
        super()._check_layer_sizes()
        wrong = [path for path, _ in self.layer_sizes if path.rpartition("/")[2] in self.biased]
        if wrong and self.shared_relpos_bias:
            raise ValueError(
                f"{type(self).__name__}.layer_sizes: {wrong} cannot share a position bias with "
                "attentions of other heads: shared_relpos_bias=False"
            )

    @property
    def lacks_head(self) -> bool:
        """Whether it is an encoder alone whose outputs nobody reads yet."""
        return not self.num_decoder_layers and self.head is None

    @property
    def num_outputs(self) -> int:
        """Values that the head gives: a logit for each label, or one number."""
        return len(self.labels) or 1

    def encoder_only(self) -> "T5Config":
        """The same encoder without a decoder."""
        sizes = tuple(entry for entry in self.layer_sizes if entry[0].startswith("encoder/"))
        return self.replace(num_decoder_layers=0, logits_via_embedding=False, layer_sizes=sizes)

    def network(self) -> nn.Module:
        """`Transformer` where there is a decoder, else `TextEncoder`."""
        from coda_jax.models.t5.network import Transformer  # which reads this class
        from coda_jax.models.t5.text_encoder import TextEncoder

        return Transformer(self) if self.num_decoder_layers else TextEncoder(self)

    def input_spec(self, batch: int, length: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the encoder's inputs, [B, N] int32 token ids."""
        return jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def init_inputs(self) -> tuple[Array, ...]:
        """Arguments with which the network makes its parameters."""
        spec = self.input_spec(1, 2)  # parameters do not depend on batch or length
        tokens = jnp.ones((1, 2), jnp.int32)
        inputs = jnp.ones(spec.shape, spec.dtype)
        return (inputs, tokens, tokens) if self.num_decoder_layers else (inputs,)

    def projections(self, place: Place) -> tuple[Projection, ...]:
        """The frozen matrices of a layer."""
        if place.stack == "encoder":
            return (*self._attention(place, "attention", "context"), *self._mlp(place, "mlp"))
        return (
            *self._attention(place, "self_attention", "tokens"),
            *self._attention(place, "encoder_decoder_attention", "context"),
            *self._mlp(place, "mlp"),
        )

    def _attention(self, place: Place, path: str, keys: str) -> tuple[Projection, ...]:
        inner = self.size_of(place, path) * self.head_dim
        rows = {"query": "tokens", "key": keys, "value": keys}
        made = (Projection(f"{path}/{n}", self.emb_dim, inner, r) for n, r in rows.items())
        return (*made, Projection(f"{path}/out", inner, self.emb_dim))

    def _mlp(self, place: Place, path: str) -> tuple[Projection, ...]:
        gated, inner = len(self.mlp_activations) > 1, self.size_of(place, path)
        names = [f"wi_{i}" for i in range(len(self.mlp_activations))] if gated else ["wi"]
        made = (Projection(f"{path}/{name}", self.emb_dim, inner) for name in names)
        return (*made, Projection(f"{path}/wo", inner, self.emb_dim))

    def mixing_flops(self, place: Place, tokens: int, context: int) -> float:
        """Logits and weighted sums of the attentions; a decoder's own reads its whole cache."""
        if place.stack == "encoder":
            seen = context * self.size_of(place, "attention")
        else:
            seen = tokens * self.size_of(place, "self_attention")
            seen += context * self.size_of(place, "encoder_decoder_attention")
        return 2 * 2 * tokens * seen * self.head_dim

    def output_flops(self, inputs: int, targets: int) -> float:
        """The logits of T outputs of the decoder, or what a head makes of pooled outputs."""
        del inputs
        if self.num_decoder_layers:
            return 2 * targets * self.emb_dim * self.vocab_size
        return 0.0 if self.head is None else 2 * self.emb_dim * self.num_outputs


def sizes(emb_dim, num_heads, num_encoder_layers, num_decoder_layers, mlp_dim, head_dim=64):
    """The fields of a size, in the order of the published tables."""
    return {
        "emb_dim": emb_dim,
        "num_heads": num_heads,
        "num_encoder_layers": num_encoder_layers,
        "num_decoder_layers": num_decoder_layers,
        "mlp_dim": mlp_dim,
        "head_dim": head_dim,
    }


_GATED = {"mlp_activations": ("gelu", "linear")}
_T5_1_1 = {
    "small": sizes(512, 6, 8, 8, 1024),
    "base": sizes(768, 12, 12, 12, 2048),
    "large": sizes(1024, 16, 24, 24, 2816),
    "xl": sizes(2048, 32, 24, 24, 5120),
    "xxl": sizes(4096, 64, 24, 24, 10240),
}
_T5_1_0 = {
    "small": sizes(512, 8, 6, 6, 2048),
    "base": sizes(768, 12, 12, 12, 3072),
    "large": sizes(1024, 16, 24, 24, 4096),
    "3b": sizes(1024, 32, 24, 24, 16384, head_dim=128),
    "11b": sizes(1024, 128, 24, 24, 65536, head_dim=128),
}
_BYT5 = {
    "small": sizes(1472, 6, 12, 4, 3584),
    "base": sizes(1536, 12, 18, 6, 3968),
    "large": sizes(1536, 16, 36, 12, 3840),
    "xl": sizes(2560, 32, 36, 12, 6720),
    "xxl": sizes(4672, 64, 36, 12, 12352),
}
PRESETS = {
    **{
        f"t5_1_0_{size}": T5Config(32128, logits_via_embedding=True, **each)
        for size, each in _T5_1_0.items()
    },
    **{
        f"{model}_{size}": T5Config(vocab_size, **_GATED, **each)
        for model, vocab_size, table in (
            ("t5_1_1", 32128, _T5_1_1),
            ("flan_t5", 32128, _T5_1_1),
            ("mt5", 250112, _T5_1_1),
            ("byt5", 384, _BYT5),
        )
        for size, each in table.items()
    },
    **{
        f"umt5_{size}": T5Config(256384, shared_relpos_bias=False, **_GATED, **_T5_1_1[size])
        for size in ("small", "base", "xl", "xxl")
    },
    "t5_1_1_stdlib": T5Config(4096, **_GATED, **sizes(192, 3, 4, 2, 512)),  # bundled
}
TINY = T5Config(  # for tests and examples
    20,
    relpos_num_buckets=8,
    relpos_max_distance=16,
    **_GATED,
    **sizes(16, 2, 2, 1, 24, head_dim=8),
)

_LOGITS = "decoder/logits_dense/kernel"  # of all T5 but 1.0
_T5X_BUCKETS = 32
_BIASES = {  # by whether the layers share one
    True: "encoder/relpos_bias/rel_embedding",
    False: "encoder/layers_0/relpos_bias/rel_embedding",
}
_TELLING = {  # matrices from whose shapes the sizes are read
    "embedding": "token_embedder/embedding",
    "query": "encoder/layers_0/attention/query/kernel",
    "mlp": "encoder/layers_0/mlp/wo/kernel",
}


def infer_config(params: Mapping[str, Any]) -> T5Config:
    """The dense config of a T5's parameters, as far as their shapes tell it.

    The rest is what T5X's own network fixes: gated layers use GELU, and relative positions end at
    128.

    Raises:
        ValueError: leaves that tell a size are missing, or they look like no known T5.
    """
    flat = trees.flatten(params)
    shared = _BIASES[False] not in flat
    telling = {**_TELLING, "bias": _BIASES[shared]}
    shapes = {name: getattr(flat.get(path), "shape", ()) for name, path in telling.items()}
    missing = [telling[name] for name, shape in shapes.items() if len(shape) != 2]
    if missing:
        raise ValueError(f"these parameters are not a T5's, they lack the matrices {missing}")
    gated, tied = "encoder/layers_0/mlp/wi_0/kernel" in flat, _LOGITS not in flat
    if gated == tied:
        raise ValueError(
            f"these parameters are neither T5 1.0's nor a later T5's: with {gated=}, {_LOGITS} "
            f"must be {'there' if gated else 'missing'}; if that is so, give the config"
        )
    layers = {
        stack: {path.split("/")[1] for path in flat if path.startswith(f"{stack}/layers_")}
        for stack in ("encoder", "decoder")
    }
    vocab_size, emb_dim = shapes["embedding"]
    num_heads, num_buckets = shapes["bias"]
    if num_buckets != _T5X_BUCKETS:
        raise ValueError(
            f"a relative position bias with {num_buckets} buckets is not of T5X's own network, "
            f"which has {_T5X_BUCKETS}, and does not tell the largest distance; give the config"
        )
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=len(layers["encoder"]),
        num_decoder_layers=len(layers["decoder"]),
        head_dim=shapes["query"][1] // num_heads,
        mlp_dim=shapes["mlp"][0],
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding=tied,
        shared_relpos_bias=shared,
    )
