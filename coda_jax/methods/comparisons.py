"""The methods that benchmarks set side by side."""

from collections.abc import Sequence

from coda_jax.methods.base import Method
from coda_jax.methods.coda import Coda
from coda_jax.methods.full import Full
from coda_jax.methods.parallel_adapter import ParallelAdapter

BASELINE = "parallel adapter"


def name_of(reduction: float) -> str:
    """What the model at a reduction is called."""
    return f"CoDA r = {reduction:g}"


def baseline(bottleneck: int = 64) -> tuple[Method, ...]:
    """The parallel adapter alone, the 1.0x of the paper's tables."""
    return (ParallelAdapter(bottleneck),)


def everything() -> tuple[Method, ...]:
    """The dense model, all of which is trained."""
    return (Full(),)


def conditional(
    reductions: Sequence[float], bottleneck: int = 64, attentions: Sequence[str] = ("k_to_k",)
) -> dict[str, tuple[Method, ...]]:
    """CoDA with the same adapter, by name: for each attention and reduction r."""
    return {
        f"{name_of(r)}, {attention}": (Coda(r, attention=attention), *baseline(bottleneck))
        for attention in attentions
        for r in reductions
    }
