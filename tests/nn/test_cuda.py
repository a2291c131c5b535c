"""Functions with a kernel for CUDA GPUs, everywhere else."""

import jax
import jax.numpy as jnp
import numpy as np

from coda_jax.nn.cuda import with_kernel


def plain(x, y, *, times):
    return x + times * y, x.sum()


def kernel(x, y, *, times):
    return x - times * y, jnp.cos(x.sum())


def results(x, y, *, times):
    return [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((), x.dtype)]


FUNCTION = with_kernel(plain, kernel, results)
X, Y = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))


def test_others_compute_the_default():
    for function in (FUNCTION, jax.jit(FUNCTION, static_argnames="times")):
        for found, expected in zip(function(X, Y, times=2), plain(X, Y, times=2), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert FUNCTION(X, Y, times=3)[0][0, 0] == 3


def test_rows_are_mapped():
    found = jax.vmap(lambda x, y: FUNCTION(x, y, times=2), (0, None))(X, Y[0])
    np.testing.assert_array_equal(found[0], X + 2)
    np.testing.assert_array_equal(found[1], X.sum(1))


def test_gpus_compute_the_kernel_but_in_what_is_exported():
    jitted = jax.jit(lambda x, y: FUNCTION(x, y, times=2))
    text = jitted.trace(X, Y).lower(lowering_platforms=("cuda",)).as_text()
    assert "cosine" in text
    exported = jax.export.export(jitted, platforms=["cuda"])(X, Y)
    assert "cosine" not in exported.mlir_module()
