"""Small trained modules beside a frozen layer."""

import dataclasses

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from coda_jax.layers import Dense, activation_function


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The bottleneck adapter.

    Attributes:
        bottleneck: width between the two projections.
        activation: name of a function in `flax.linen`, or "linear".
    """

    bottleneck: int = 64
    activation: str = "relu"

    def __post_init__(self):
        if self.bottleneck < 1:
            raise ValueError(f"AdapterConfig.bottleneck must be at least 1, got {self.bottleneck}")
        activation_function(self.activation)


class Adapter(nn.Module):
    """Adapter(u) = act(u W_down) W_up, with W_up zero at the start.

    Reference: He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning.
    """

    config: AdapterConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, u: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        hidden = Dense(
            self.config.bottleneck, kernel_axes=("embed", "mlp"), dtype=self.dtype, name="wi"
        )(u)
        hidden = activation_function(self.config.activation)(hidden)
        return Dense(
            u.shape[-1],
            kernel_axes=("mlp", "embed"),
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="wo",
        )(hidden)
