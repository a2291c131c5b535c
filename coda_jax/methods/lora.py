"""LoRA: a product of two thin matrices beside frozen projections.

Axis letters: B batch, N tokens, D inputs, F outputs, R rank.
Reference: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from flax import linen as nn
from flax.linen import partitioning
import jax.numpy as jnp
from jaxtyping import Array, Float

from coda_jax import checks, trees
from coda_jax.methods.base import Call, LayerFlops, Method, Place
from coda_jax.nn.layers import Dense, Vectors, product

# The start of A, as in the authors' library: uniform within 1 / sqrt(D).
_START = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class Lora(Method):
    """x W -> x W + (alpha / rank) x A B, A [D, R] random and B [R, F] zero at the start.

    Attributes:
        rank: R.
        alpha: strength of the update, which is scaled by alpha / rank.
        targets: patterns of the paths of projections; by default queries and values of every
            attention.
    """

    name: ClassVar[str] = "lora"
    creates: ClassVar[tuple[str, ...]] = (r"/lora_[ab]$",)
    profile_scopes: ClassVar = {"lora": ("lora",)}

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"attention/(query|value)$",)

    @classmethod
    def examples(cls) -> tuple["Lora", ...]:
        """The usual targets, and all projections of a layer."""
        return cls(), cls(targets=(r"(attention|mlp|convolution)/\w+$",))

    def __post_init__(self):
        checks.fields(
            self,
            rank=checks.COUNT,
            alpha=checks.Number(above=0),
            targets=checks.Each(checks.pattern, least=1),
        )

    def validate(self, config: Any) -> None:
        """Raises ValueError where a target is no projection of the model."""
        paths = [
            f"{stack}/layers_{i}/{projection.path}"
            for stack, depth in (
                ("encoder", config.num_encoder_layers),
                ("decoder", config.num_decoder_layers),
            )
            for i in range(depth)
            for projection in config.projections(stack)
        ]
        idle = [t for t in self.targets if not any(trees.matches(path, (t,)) for path in paths)]
        if idle:
            kinds = sorted({path.split("/", 2)[2] for path in paths})
            raise ValueError(f"Lora.targets {idle} match no projection; there are {kinds}")

    def wrap_module(self, call: Call, module: nn.Module) -> Call:
        """A target's product, plus the update's."""
        path = "/".join(module.path)
        if not isinstance(module, Dense) or not trees.matches(path, self.targets):
            return call

        def updated(x: Vectors) -> Float[Array, "... f"]:
            inputs, outputs = module.kernel_axes  # "kv" is an axis that T5X never divides
            a = partitioning.param_with_axes(
                "lora_a", _START, (x.shape[-1], self.rank), jnp.float32, axes=(inputs, "kv")
            )
            b = partitioning.param_with_axes(
                "lora_b",
                nn.initializers.zeros,
                (self.rank, module.features),
                jnp.float32,
                axes=("kv", outputs),
            )
            a, b = (leaf.astype(module.dtype) for leaf in (a, self.alpha / self.rank * b))
            return call(x) + product(product(x, a), b)

        return updated

    def wrap_flops(self, flops: LayerFlops, place: Place, config: Any) -> LayerFlops:
        """Two thin products for each target."""
        prefix = f"{place.stack}/layers_{place.index}"
        targets = [
            projection
            for projection in config.projections(place.stack)
            if trees.matches(f"{prefix}/{projection.path}", self.targets)
        ]

        def updated(tokens, context):
            rows = {"tokens": tokens, "context": context}
            sizes = (rows[target.rows] * (target.inputs + target.outputs) for target in targets)
            return flops(tokens, context) + 2 * self.rank * sum(sizes)

        return updated

    def merge(self, config: Any, params: Mapping[str, Any]) -> tuple[None, Mapping[str, Any]]:
        """Nothing of the method, and W + (alpha / rank) A B in the place of each W."""
        del config
        leaves = trees.flatten(params)
        for path in [path for path in leaves if path.endswith("/lora_a")]:
            module = path.removesuffix("/lora_a")
            a, b = leaves.pop(f"{module}/lora_a"), leaves.pop(f"{module}/lora_b")
            kernel = leaves[f"{module}/kernel"]
            product = jnp.asarray(a, jnp.float32) @ jnp.asarray(b, jnp.float32)
            merged = jnp.asarray(kernel, jnp.float32) + self.alpha / self.rank * product
            leaves[f"{module}/kernel"] = merged.astype(kernel.dtype)
        return None, trees.unflatten(leaves)
