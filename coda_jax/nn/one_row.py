"""A product of one row, as a decoding step of one input has them, on a TPU.

Axis letters: D inputs, F outputs.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Product = Callable[[Float[Array, "... d"], Array], Float[Array, "... f"]]


def of_two_rows(product: Product) -> Product:
    """The product of one row, of whatever rank, with a second row of zeros.

    A TPU's compiler does not give one row to the matrix unit: x W in bfloat16 then takes seven
    times the cycles (docs/performance.md).

    Args:
        product: x [B, D] and W to x W [B, F].
    """

    def with_zeros(x, kernel):
        rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
        return product(rows, kernel)[:1].reshape(*x.shape[:-1], -1)

    return with_zeros
