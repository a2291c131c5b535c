"""Houlsby's adapter: a small bottleneck behind each sublayer.

Axis letters: B batch, N tokens, D embedding.
Reference: Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP.
"""

import dataclasses
from typing import Any, ClassVar

from flax import linen as nn

from coda_jax import checks
from coda_jax.methods.base import NORMS, Call, LayerFlops, Method, Place
from coda_jax.nn.attention import Attention
from coda_jax.nn.bottleneck import Bottleneck
from coda_jax.nn.convolution import Convolution
from coda_jax.nn.layers import ACTIVATIONS, MlpBlock
from coda_jax.nn.relative_keys import RelativeKeyAttention

SUBLAYERS = (Attention, RelativeKeyAttention, MlpBlock, Convolution)


@dataclasses.dataclass(frozen=True)
class HoulsbyAdapter(Method):
    """z -> z + act(z W_down) W_up, z [B, N, D] the output of a sublayer before its residual.

    Two for each encoder layer of a T5, three for each decoder layer, four for a Conformer layer.

    Attributes:
        bottleneck: width between the two projections.
        activation: one of `nn.layers.ACTIVATIONS`.
    """

    name: ClassVar[str] = "houlsby_adapter"
    creates: ClassVar[tuple[str, ...]] = (r"/houlsby/",)
    also_trains: ClassVar[tuple[str, ...]] = NORMS
    profile_scopes: ClassVar = {"houlsby adapter": ("houlsby",)}

    bottleneck: int = 64
    activation: str = "relu"

    def __post_init__(self):
        checks.fields(self, bottleneck=checks.COUNT, activation=checks.OneOf(ACTIVATIONS))

    def wrap_module(self, call: Call, module: nn.Module) -> Call:
        """A sublayer, plus the adapter on its output."""
        if not isinstance(module, SUBLAYERS):
            return call

        def adapted(*arguments, **options):
            z = call(*arguments, **options)
            return z + Bottleneck(self.bottleneck, self.activation, z.dtype, name="houlsby")(z)

        return adapted

    def wrap_flops(self, flops: LayerFlops, place: Place, config: Any) -> LayerFlops:
        """Two more products for each row of a sublayer's output, which its last matrix makes."""
        rows_of = {p.path.split("/")[0]: p.rows for p in config.projections(place.stack)}
        per_row = 2 * 2 * config.emb_dim * self.bottleneck

        def adapted(tokens, context):
            rows = {"tokens": tokens, "context": context}
            return flops(tokens, context) + per_row * sum(rows[x] for x in rows_of.values())

        return adapted
