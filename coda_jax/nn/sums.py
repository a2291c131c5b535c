"""Sums whose order does not depend on the shape, so that equal rows give equal bits.

Axis letters: D channels.
"""

import functools
import operator

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _apart(x: Array) -> Array:
    """x rounded to one bit less than float32 has: the compiler merges nothing across it."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=22)


@jax.custom_jvp
def sum_in_order(x: Float[Array, "... d"]) -> Float[Array, "..."]:
    """The sum over the last axis; on a CPU equal rows have equal sums, whatever the shape.

    XLA's CPU backend adds up a `reduce`, or a product with a vector, in an order that it picks by
    the size of the whole array. So here every addition is an operation of its own, in blocks of 64,
    8 and 1 channels. x is rounded first, to one bit less than float32 has: where x is a product,
    the compiler would else merge the product into the first addition in one program, with one
    rounding for both, and not in another.

    Other platforms use `jnp.sum`, which is cheap there.

    Args:
        x: [..., D] float32.

    Returns:
        [...] float32.
    """
    return lax.platform_dependent(x, cpu=_sum_of_blocks, default=lambda x: jnp.sum(x, axis=-1))


@sum_in_order.defjvp
def _sum_in_order_jvp(primals, tangents):
    return sum_in_order(*primals), jnp.sum(*tangents, axis=-1)


def _sum_of_blocks(x):
    x = _apart(x)
    for width in (64, 8, 1):
        blocks = -(-x.shape[-1] // width)
        if blocks > 1:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * width - x.shape[-1])])
            x = functools.reduce(operator.add, jnp.split(x, blocks, axis=-1))
    return x[..., 0]


def inverse_rms(x: Float[Array, "... d"], epsilon: float) -> Float[Array, "... 1"]:
    """1 / sqrt(mean(x^2) + epsilon) over the last axis, bit by bit as `sum_in_order`."""
    mean = _apart(sum_in_order(lax.square(x)) / x.shape[-1])
    # Not rsqrt: on CPUs it refines an estimate that one value and a vector of them get differently.
    return (1 / _apart(jnp.sqrt(mean + epsilon)))[..., None]
