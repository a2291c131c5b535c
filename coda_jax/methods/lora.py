"""LoRA: a product of two thin matrices beside frozen projections; DoRA learns columns' sizes, too.

Axis letters: B batch, N tokens, D inputs, F outputs, R rank.
References: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models; Kalajdzievski 2023,
A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA; Liu et al. 2024, DoRA:
Weight-Decomposed Low-Rank Adaptation.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any, ClassVar

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from coda_jax import checks, trees
from coda_jax.methods.base import Call, LayerFlops, Method, Place, new_leaf
from coda_jax.nn.layers import Dense, Vectors, product

_LAYER = re.compile(r"(^|/)layers_\d+/")  # in the paths of `ModelConfig.projections`
_ZEROS = nn.initializers.zeros
# The start of A, as in the authors' library: uniform within 1 / sqrt(D).
_START = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class Lora(Method):
    """x W -> x W + s x A B, A [D, R] random and B [R, F] zero at the start, s = alpha / rank.

    DoRA: x W -> x V (|W| + m) / |V|, V = W + s A B, |V| [F] the norms of its columns, m [F] zero at
    the start. (Its authors learn |W| + m, and take |V| for a constant in the gradient; here it is
    none.)

    Attributes:
        rank: R.
        alpha: strength of the update.
        targets: patterns of the paths of projections; by default queries and values of every
            attention.
        rank_stabilized: whether s = alpha / sqrt(rank), for high ranks (rsLoRA).
        weight_decomposed: whether the sizes of the columns are learned apart (DoRA).
    """

    name: ClassVar[str] = "lora"
    creates: ClassVar[tuple[str, ...]] = (r"/lora_(a|b|magnitude)$",)
    profile_scopes: ClassVar = {"lora": ("lora",)}

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"attention/(query|value)$",)
    rank_stabilized: bool = False
    weight_decomposed: bool = False

    @classmethod
    def examples(cls) -> tuple["Lora", ...]:
        """The usual targets, and all projections of a layer."""
        everything = (r"(attention|mlp|convolution)/\w+$",)
        return (
            cls(),
            cls(targets=everything),
            cls(targets=everything, rank_stabilized=True, weight_decomposed=True),
        )

    def __post_init__(self):
        checks.fields(
            self,
            rank=checks.COUNT,
            alpha=checks.Number(above=0),
            targets=checks.Each(checks.pattern, least=1),
            rank_stabilized=checks.flag,
            weight_decomposed=checks.flag,
        )

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def validate(self, config: Any) -> None:
        """Raises ValueError where a target is no projection of the model, or thinner than R."""
        projections = {
            f"{place.path}/{projection.path}": projection
            for stack in ("encoder", "decoder")
            for place in config.places(stack)
            for projection in config.projections(place)
        }
        idle = [t for t in self.targets if not any(trees.matches(p, (t,)) for p in projections)]
        if idle:
            kinds = sorted({path.split("/", 2)[2] for path in projections})
            raise ValueError(f"Lora.targets {idle} match no projection; there are {kinds}")
        for path, projection in projections.items():
            width = min(projection.inputs, projection.outputs)
            if trees.matches(path, self.targets) and self.rank > width:
                raise ValueError(f"Lora.rank={self.rank} is above the width {width} of {path}")

    def wrap_module(self, call: Call, module: nn.Module) -> Call:
        """A target's product, plus the update's."""
        path = "/".join(module.path)
        of_layer = isinstance(module, Dense) and _LAYER.search(path)
        if not of_layer or not trees.matches(path, self.targets):
            return call

        def updated(x: Vectors) -> Float[Array, "... f"]:
            inputs, outputs = module.kernel_axes
            # "kv" is an axis that T5X never divides.
            a = new_leaf("lora_a", _START, (x.shape[-1], self.rank), (inputs, "kv"))
            b = self.scale * new_leaf(
                "lora_b", _ZEROS, (self.rank, module.features), ("kv", outputs)
            )
            y = call(x)
            update = product(product(x, a.astype(y.dtype)), b.astype(y.dtype))
            if not self.weight_decomposed:
                return y + update
            m = new_leaf("lora_magnitude", _ZEROS, (module.features,), (outputs,))
            base = module.variables["params"]
            resized = resizing(base["kernel"], a, b, m).astype(y.dtype)
            bias = base["bias"].astype(y.dtype) if module.use_bias else 0
            return (y - bias + update) * resized + bias

        return updated

    def wrap_flops(self, flops: LayerFlops, place: Place, config: Any) -> LayerFlops:
        """Two thin products for each target; DoRA's columns are scaled."""
        targets = self._targets(place, config)

        def updated(tokens, context):
            rows = {"tokens": tokens, "context": context}
            sizes = sum(rows[target.rows] * (target.inputs + target.outputs) for target in targets)
            scaled = sum(rows[target.rows] * target.outputs for target in targets)
            return flops(tokens, context) + 2 * (
                self.rank * sizes + scaled * self.weight_decomposed
            )

        return updated

    def call_flops(self, place: Place, config: Any) -> float:
        """DoRA's A^T W, and the squares of W."""
        targets = self._targets(place, config) if self.weight_decomposed else ()
        return sum(2 * (self.rank + 1) * target.inputs * target.outputs for target in targets)

    def _targets(self, place, config):
        """The projections of a layer that are targets."""
        projections = config.projections(place)
        return [p for p in projections if trees.matches(f"{place.path}/{p.path}", self.targets)]

    def merge(self, config: Any, params: Mapping[str, Any]) -> tuple[None, Mapping[str, Any]]:
        """Nothing of the method, and the updated matrix in the place of each W."""
        del config
        leaves = trees.flatten(params)
        for path in [path for path in leaves if path.endswith("/lora_a")]:
            module = path.removesuffix("lora_a")
            kernel = leaves[f"{module}kernel"]
            w, a, b = (
                jnp.asarray(x, jnp.float32)
                for x in (kernel, leaves.pop(path), leaves.pop(f"{module}lora_b"))
            )
            b = self.scale * b
            merged = w + a @ b
            if self.weight_decomposed:
                merged *= resizing(w, a, b, leaves.pop(f"{module}lora_magnitude"))
            leaves[f"{module}kernel"] = merged.astype(kernel.dtype)
        return None, trees.unflatten(leaves)

    @classmethod
    def combined(
        cls,
        methods: Sequence["Lora"],
        leaves: Sequence[Mapping[str, Any]],
        weights: Sequence[float],
    ) -> tuple["Lora", dict[str, Array]]:
        """The weighted sum of the updates, exactly: [A_1, A_2], [w_1 s_1 B_1; w_2 s_2 B_2].

        The rank is the sum of the ranks, and s = 1. The library peft calls it "cat".

        Raises:
            ValueError: other projections are targets; an update is DoRA's, which is no sum; the
                sum of the ranks is above a width.
        """
        if any(method.weight_decomposed for method in methods):
            raise ValueError("updates of DoRA (weight_decomposed) are not linear: merge each alone")
        targets = [
            {path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")}
            for flat in leaves
        ]
        if different := sorted(set.union(*targets) - set.intersection(*targets)):
            raise ValueError(f"updates of other projections are not added: {different}")
        rank = sum(method.rank for method in methods)
        joined = {}
        for path in sorted(targets[0]):
            a = [np.asarray(flat[f"{path}/lora_a"], np.float32) for flat in leaves]
            b = [
                np.asarray(weight * method.scale * np.asarray(flat[f"{path}/lora_b"], np.float64))
                for method, flat, weight in zip(methods, leaves, weights, strict=True)
            ]
            if rank > (width := min(a[0].shape[0], b[0].shape[1])):
                ranks = " + ".join(str(method.rank) for method in methods)
                raise ValueError(f"the ranks {ranks} = {rank} are above {path}'s width {width}")
            joined[f"{path}/lora_a"] = np.concatenate(a, axis=1)
            joined[f"{path}/lora_b"] = np.concatenate(b, axis=0).astype(np.float32)
        fields = {"rank": rank, "alpha": float(rank), "rank_stabilized": False}
        return dataclasses.replace(methods[0], **fields), joined


def resizing(
    w: Float[Array, "d f"], a: Float[Array, "d r"], b: Float[Array, "r f"], m: Float[Array, "f"]
) -> Float[Array, "f"]:
    """(|W| + m) / |W + A B|, norms of columns, [F] float32; no array of the size of W is made.

    Args:
        w: [D, F].
        a: [D, R].
        b: [R, F], scaled.
        m: [F].
    """
    w, a, b, m = (x.astype(jnp.float32) for x in (w, a, b, m))
    squares = jnp.sum(jnp.square(w), axis=0)
    # |W + A B|^2 = |W|^2 + 2 W . A B + |A B|^2, column by column.
    updated = squares + jnp.sum(b * (2 * a.T @ w + (a.T @ a) @ b), axis=0)
    return (jnp.sqrt(squares) + m) / jnp.sqrt(jnp.maximum(updated, jnp.finfo(jnp.float32).tiny))
