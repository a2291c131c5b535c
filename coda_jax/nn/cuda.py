"""Kernels for CUDA GPUs, where XLA's own programs are far from what the card can do."""

from collections.abc import Callable
import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def with_kernel(default: Callable, kernel: Callable, results: Callable) -> Callable:
    """A function that CUDA GPUs compute by `kernel`, and all others by `default`.

    For the `cuda` branch of a `lax.platform_dependent`. A program that is exported has `default`
    everywhere: its kernels would not outlive this version of JAX.

    Args:
        default: function(*arrays, **options) -> arrays, a tuple; options are hashable.
        kernel: gives the same.
        results: gives the shapes and dtypes of the same, as `jax.ShapeDtypeStruct`.

    Returns:
        function(*arrays, **options) -> list of arrays. It has no derivative.
    """
    primitive = Primitive(f"{kernel.__name__}_or_{default.__name__}")
    primitive.multiple_results = True

    @functools.lru_cache
    def jitted(**options):
        return jax.jit(functools.partial(primitive.bind, **options))

    def batched(arrays, axes, **options):
        found = jax.vmap(functools.partial(default, **options), axes)(*arrays)
        return found, [0] * len(found)

    primitive.def_impl(lambda *arrays, **options: jitted(**options)(*arrays))
    primitive.def_abstract_eval(
        lambda *arrays, **options: [
            jax.core.ShapedArray(x.shape, x.dtype) for x in results(*arrays, **options)
        ]
    )
    batching.primitive_batchers[primitive] = batched
    anywhere = mlir.lower_fun(default, multiple_results=True)
    on_cuda = mlir.lower_fun(kernel, multiple_results=True)

    def lowered(context, *arrays, **options):
        exported = context.module_context.lowering_parameters.for_export
        return (anywhere if exported else on_cuda)(context, *arrays, **options)

    mlir.register_lowering(primitive, anywhere)
    mlir.register_lowering(primitive, lowered, platform="cuda")
    return primitive.bind
