"""The bottleneck of adapters.

Axis letters: D embedding.
"""

import functools

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
        use_bias: whether both projections have biases, zero at the start.
    """

    width: int
    activation: str = "relu"
    dtype: Dtype = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, u: Vectors) -> Float[Array, "... d"]:
        """[..., D] -> [..., D]."""
        dense = functools.partial(Dense, dtype=self.dtype, use_bias=self.use_bias)
        down = dense(self.width, ("embed", "mlp"), name="wi")
        up = dense(u.shape[-1], ("mlp", "embed"), nn.initializers.zeros, name="wo")
        return up(activation_function(self.activation)(down(u)))
