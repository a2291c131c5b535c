"""The bottleneck of adapters.

Axis letters: D embedding.
"""

import functools

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from coda_jax.nn.layers import Dense, Dtype, Vectors, activation_function
from coda_jax.nn.tokens import Beside
from coda_jax.sharding import num_parts


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
    def __call__(self, u: Vectors, beside: bool = False) -> Float[Array, "... d"] | Beside:
        """[..., D] -> [..., D], or that with its factors, for a sum with what it is `beside`."""
        dense = functools.partial(Dense, dtype=self.dtype, use_bias=self.use_bias)
        down = dense(self.width, ("embed", "mlp"), name="wi")
        up = dense(u.shape[-1], ("mlp", "embed"), nn.initializers.zeros, name="wo")
        hidden = activation_function(self.activation)(down(u))
        y = up(hidden)
        if not beside:
            return y
        if self.dtype != jnp.bfloat16 or self.use_bias or num_parts("mlp", self.width) > 1:
            return Beside(y)
        # W_up with whatever methods make of it.
        return Beside(y, hidden, up(jnp.eye(self.width, dtype=self.dtype)))
