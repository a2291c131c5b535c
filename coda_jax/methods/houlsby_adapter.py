"""Houlsby's adapter: a small bottleneck behind each sublayer, and its variants.

Axis letters: B batch, N tokens, D embedding.
References: Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP; Pfeiffer et al.
2021, AdapterFusion (which reads x + z); He et al. 2022, Towards a Unified View of
Parameter-Efficient Transfer Learning (which reads x).
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from flax import linen as nn

from coda_jax import checks, trees
from coda_jax.methods.base import NORMS, Call, LayerFlops, Method, Place
from coda_jax.nn.attention import Attention
from coda_jax.nn.bottleneck import Bottleneck
from coda_jax.nn.convolution import Convolution
from coda_jax.nn.layers import ACTIVATIONS, MlpBlock, Normalized, Vectors
from coda_jax.nn.relative_keys import RelativeKeyAttention

SUBLAYERS = (Attention, RelativeKeyAttention, MlpBlock, Convolution)
READS = ("output", "sum", "input")


@dataclasses.dataclass(frozen=True)
class HoulsbyAdapter(Method):
    """z -> z + act(v W_down) W_up, z [B, N, D] the output of a sublayer before its residual, v = z.

    Two for each encoder layer of a T5, three for each decoder layer, four for a Conformer layer.

    Attributes:
        bottleneck: width between the two projections.
        activation: one of `nn.layers.ACTIVATIONS`.
        use_bias: whether both projections have biases.
        reads: v: the "output" z, the "sum" x + z (Pfeiffer), or the "input" x (parallel), x the
            residual stream that the sublayer normalises; of a Conformer the output alone.
        targets: patterns of the paths of sublayers; by default all of them.
        train_norms: whether the base's layer norms are trained, too.
    """

    name: ClassVar[str] = "houlsby_adapter"
    creates: ClassVar[tuple[str, ...]] = (r"/houlsby/",)
    profile_scopes: ClassVar = {"houlsby adapter": ("houlsby",)}

    bottleneck: int = 64
    activation: str = "relu"
    use_bias: bool = False
    reads: str = "output"
    targets: tuple[str, ...] = (r".*",)
    train_norms: bool = True

    @classmethod
    def examples(cls) -> tuple["HoulsbyAdapter", ...]:
        """The usual one, and with biases behind feed-forward blocks alone."""
        return cls(), cls(use_bias=True, targets=("mlp$",), train_norms=False)

    def __post_init__(self):
        checks.fields(
            self,
            bottleneck=checks.COUNT,
            activation=checks.OneOf(ACTIVATIONS),
            use_bias=checks.flag,
            reads=checks.OneOf(READS),
            targets=checks.Each(checks.pattern, least=1),
            train_norms=checks.flag,
        )

    @property
    def also_trains(self) -> tuple[str, ...]:
        """The norms, where they are trained."""
        return NORMS if self.train_norms else ()

    def validate(self, config: Any) -> None:
        """Raises ValueError where a target is no sublayer of the model."""
        paths = sublayers(config)
        idle = [t for t in self.targets if not any(trees.matches(p, (t,)) for p in paths)]
        if idle:
            kinds = sorted({path.split("/", 2)[2] for path in paths})
            raise ValueError(f"HoulsbyAdapter.targets {idle} match no sublayer; there are {kinds}")

    def wrap_module(self, call: Call, module: nn.Module) -> Call:
        """A sublayer, plus the adapter on what it reads."""
        if not isinstance(module, SUBLAYERS):
            return call
        if not trees.matches("/".join(module.path), self.targets):
            return call

        def adapted(x: Vectors, *arguments, **options):
            z = call(x, *arguments, **options)
            behind = Bottleneck(
                self.bottleneck, self.activation, z.dtype, self.use_bias, name="houlsby"
            )
            return z + behind(self._read(x, z))

        return adapted

    def _read(self, x, z):
        """v, of what a sublayer is given and what it gives."""
        if self.reads == "output":
            return z
        if not isinstance(x, Normalized):
            raise ValueError(
                f"HoulsbyAdapter.reads={self.reads!r} needs the residual stream, of which the "
                "sublayers of this family see the norm alone; every family has 'output'"
            )
        stream = x.x.astype(z.dtype)
        return stream if self.reads == "input" else stream + z

    def wrap_flops(self, flops: LayerFlops, place: Place, config: Any) -> LayerFlops:
        """Two more products for each row of a sublayer's output, which its last matrix makes."""
        rows_of = _rows_of(config, place)
        targets = [
            r for x, r in rows_of.items() if trees.matches(f"{place.path}/{x}", self.targets)
        ]
        per_row = 2 * 2 * config.emb_dim * self.bottleneck

        def adapted(tokens, context):
            rows = {"tokens": tokens, "context": context}
            return flops(tokens, context) + per_row * sum(rows[x] for x in targets)

        return adapted


def sublayers(config: Any) -> list[str]:
    """The paths of all sublayers of a model."""
    return [
        f"{place.path}/{name}"
        for stack in ("encoder", "decoder")
        for place in config.places(stack)
        for name in _rows_of(config, place)
    ]


def _rows_of(config: Any, place: Place) -> Mapping[str, str]:
    """{sublayer: the rows of its last matrix} of a layer."""
    return {p.path.split("/")[0]: p.rows for p in config.projections(place)}
