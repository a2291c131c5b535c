"""The parallel adapter: a small bottleneck beside each layer, which sees every token.

Axis letters: B batch, N tokens, D embedding.
Reference: He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning.
"""

import dataclasses
from typing import Any, ClassVar

from coda_jax import checks
from coda_jax.methods.base import NORMS, Layer, LayerFlops, Method, Place
from coda_jax.nn.bottleneck import Bottleneck
from coda_jax.nn.layers import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class ParallelAdapter(Method):
    """y = layer(x) + act(u W_down) W_up, u the normalised input, beside encoder and decoder layers.

    Attributes:
        bottleneck: width between the two projections.
        activation: one of `nn.layers.ACTIVATIONS`.
    """

    name: ClassVar[str] = "parallel_adapter"
    creates: ClassVar[tuple[str, ...]] = (r"(^|/)adapter/",)
    also_trains: ClassVar[tuple[str, ...]] = NORMS
    profile_scopes: ClassVar = {"adapter": ("adapter",)}

    bottleneck: int = 64
    activation: str = "relu"

    def __post_init__(self):
        checks.fields(self, bottleneck=checks.COUNT, activation=checks.OneOf(ACTIVATIONS))

    def wrap_layer(self, layer: Layer, place: Place) -> Layer:
        """The layer, plus the adapter on all of its tokens."""
        del place

        def adapted(tokens, context):
            dtype = tokens.x.dtype
            adapter = Bottleneck(self.bottleneck, self.activation, dtype, name="adapter")
            if tokens.selection is None:
                return layer(tokens, context) + adapter(tokens.u)
            # The layer's output is itself a sum over all tokens.
            return layer(tokens.replace(beside=adapter(tokens.u, beside=True)), context)

        return adapted

    def wrap_flops(self, flops: LayerFlops, place: Place, config: Any) -> LayerFlops:
        """Two more products for each token."""
        del place
        per_token = 2 * 2 * config.emb_dim * self.bottleneck
        return lambda tokens, context: flops(tokens, context) + per_token * tokens
