"""A product of one row, as a decoding step of one input has them, on a TPU.

Axis letters: D inputs, F outputs.
"""

from collections.abc import Callable
import math

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

Product = Callable[[Float[Array, "... d"], Array], Float[Array, "... f"]]


def of_two_rows(product: Product) -> Product:
    """The same product, where a TPU gets a second row, of zeros, if there is one.

    Its compiler does not give one row to the matrix unit: x W in bfloat16 then takes seven times
    the cycles (docs/performance.md).

    Args:
        product: x [B, D] and W to x W [B, F]; x may have any other rank if it has more rows.
    """

    def with_zeros(x, kernel):
        rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
        return product(rows, kernel)[:1].reshape(*x.shape[:-1], -1)

    def of_rows(x, kernel):
        if math.prod(x.shape[:-1]) != 1:
            return product(x, kernel)
        return lax.platform_dependent(x, kernel, tpu=with_zeros, default=product)

    return of_rows
