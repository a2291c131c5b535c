"""The bottleneck of adapters.

Axis letters: D embedding.
"""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from coda_jax.nn.layers import Dense, Dtype, Vectors, activation_function


class Bottleneck(nn.Module):
    """act(u W_down) W_up, with W_up zero at the start.

    Attributes:
        width: between the two projections.
        activation: one of `nn.layers.ACTIVATIONS`.
        dtype: of the computation.
    """

    width: int
    activation: str = "relu"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, u: Vectors) -> Float[Array, "... d"]:
        """[..., D] -> [..., D]."""
        down = Dense(self.width, ("embed", "mlp"), dtype=self.dtype, name="wi")
        up = Dense(
            u.shape[-1], ("mlp", "embed"), nn.initializers.zeros, dtype=self.dtype, name="wo"
        )
        return up(activation_function(self.activation)(down(u)))
