"""Structured pruning adapters: what is not needed vanishes, what stays gets an adapter that merges.

Axis letters: B batch, N tokens, D inputs, F outputs, H heads, R rank, P prototypes.
Reference: Hedegaard et al. 2022, Structured Pruning Adapters, arXiv 2211.10155.
"""

from collections.abc import Iterator, Mapping
import contextlib
import contextvars
import dataclasses
from typing import Any, ClassVar, NamedTuple

from flax import linen as nn
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from coda_jax import checks, trees
from coda_jax.methods.base import Call, LayerFlops, Method, Place, new_leaf
from coda_jax.methods.lora import Lora
from coda_jax.methods.pruning import (
    CRITERIA,
    Schedule,
    gated,
    keep_best,
    keep_best_of_each,
    kronecker,
    masked_blocks,
)
from coda_jax.methods.pruning_groups import (
    MASK,
    cost_of,
    group_norms,
    has_kernels,
    is_of_heads,
    is_prunable,
    masks_of,
    silence,
    targets_of,
    without_layer,
)
from coda_jax.nn.attention import DotProductAttention
from coda_jax.nn.convolution import DepthwiseConvolution
from coda_jax.nn.layers import Dense, Vectors, product

KINDS = ("splora", "sppara", "splopa")
SCOPES = ("global", "uniform")
LEAST_HEADS, LEAST_CHANNELS = 1, 8
_START = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_ZEROS, _ONES = nn.initializers.zeros, nn.initializers.ones


class PruningState(NamedTuple):
    """What pruning keeps from step to step.

    Attributes:
        step: steps so far.
        scores: of each group, where its mask is in the tree of parameters.
        inner: the optimizer's.
    """

    step: Array
    scores: dict[str, Any]
    inner: optax.OptState


@dataclasses.dataclass(frozen=True)
class StructuredPruning(Method):
    """x W -> x (W + A B) with the columns and rows of groups that are gone at zero.

    Groups are the heads of every attention and the hidden channels of every feed-forward block;
    one head and 8 channels stay in each. Kinds:

    - "splora": A [D, R] and B [R, F] beside each matrix of such a group;
    - "sppara": the same, and c [D] added to the centre tap of each convolution by channel;
    - "splopa": W + sum_p kron(w_p, a_p b_p) in the place of W + A B, prototypes a_p b_p [block,
      block] that all layers share, position weights w_p [D / block, F / block]; groups are blocks.

    Attributes:
        kind: see above.
        rank: R; of prototypes, that of each. 0 in SPLoRA: masks alone, with `Full` (fine-pruning).
        criterion: which groups go first: those with the least norm of their weights ("weight"), the
            least gradient of what they give ("gradient"), or that times what they give ("taylor").
            Blocks go by movement, the sum of -W x its gradient, whatever is said here.
        density: the share of the prunable weights that stays in the end.
        start: steps before the first pruning.
        steps: from the first pruning to the last; what follows is recovery.
        every: steps from one pruning to the next, in which scores add up.
        scope: "global" (groups compete over all layers) or "uniform" (every layer loses the same
            share, and the same heads, as checkpoints of Hugging Face need it).
        block: rows and columns of a block.
        prototypes: P.
    """

    name: ClassVar[str] = "structured_pruning"
    creates: ClassVar[tuple[str, ...]] = (r"/pruning_\w+$",)
    without_gradient: ClassVar[tuple[str, ...]] = (rf"/{MASK}$",)
    on_quantized: ClassVar[bool] = False
    profile_scopes: ClassVar = {}

    kind: str = "splora"
    rank: int = 8
    criterion: str = "taylor"
    density: float = 0.5
    start: int = 100
    steps: int = 500
    every: int = 50
    scope: str = "global"
    block: int = 32
    prototypes: int = 64

    def __post_init__(self):
        checks.fields(
            self,
            kind=checks.OneOf(KINDS),
            rank=checks.Whole(int(self.kind != "splora")),
            criterion=checks.OneOf(CRITERIA),
            density=checks.Number(above=0, most=1),
            start=checks.COUNT,
            steps=checks.Whole(0),
            every=checks.COUNT,
            scope=checks.OneOf(SCOPES),
            block=checks.COUNT,
            prototypes=checks.COUNT,
        )
        if self.kind == "splopa" and self.scope == "uniform":
            raise ValueError(
                "StructuredPruning.scope='uniform' is of heads and channels, not blocks"
            )

    @classmethod
    def examples(cls) -> tuple["StructuredPruning", ...]:
        """Low-rank adapters in each scope, and blocks."""
        return (
            cls(start=1, steps=0, every=1),
            cls(criterion="weight", scope="uniform", start=1, steps=0, every=1),
            cls("splopa", rank=1, block=4, prototypes=3, start=1, steps=0, every=1),
        )

    @property
    def schedule(self) -> Schedule:
        """When groups go."""
        return Schedule(self.density, self.start, self.steps, self.every)

    @property
    def least_steps(self) -> int:
        """The step of the last pruning."""
        return self.schedule.last if self.density < 1 else 0

    def validate(self, config: Any) -> None:
        """Raises ValueError where a model has matrices too small for it, or no convolution."""
        places = [*config.places("encoder"), *config.places("decoder")]
        projections = [p for place in places for p in config.projections(place)]
        convolves = any(p.path.startswith("convolution/") for p in projections)
        if self.kind == "sppara" and not convolves:
            raise ValueError("StructuredPruning.kind='sppara' is of convolutions: there are none")
        if self.scope == "uniform" and config.layer_sizes:
            raise ValueError("StructuredPruning.scope='uniform' is of layers of one size: 'global'")
        others = [m.name for m in config.methods if isinstance(m, Lora)]
        if others and self.kind == "splopa":
            raise ValueError(f"StructuredPruning.kind='splopa' replaces what {others} would update")
        if others and self.criterion == "weight":
            raise ValueError(f"StructuredPruning.criterion='weight' ignores {others}: 'taylor'")
        for p in (p for place in places for p in targets_of(config, place)):
            if self.kind == "splopa" and (p.inputs % self.block or p.outputs % self.block):
                raise ValueError(
                    f"StructuredPruning.block={self.block} does not divide {p.path} "
                    f"[{p.inputs}, {p.outputs}]"
                )
            width = self.block if self.kind == "splopa" else min(p.inputs, p.outputs)
            if self.rank > width:
                raise ValueError(
                    f"StructuredPruning.rank={self.rank} is above the width {width} of {p.path}"
                )

    def wrap_module(self, call: Call, module: nn.Module) -> Call:
        """Adapters beside matrices and convolutions, gates behind heads and before `wo`."""
        if self.kind == "splopa":
            return self._wrap_blocks(call, module)
        if isinstance(module, DotProductAttention):
            return lambda *arguments, **options: self._gate(1, module, call(*arguments, **options))
        if isinstance(module, DepthwiseConvolution) and self.kind == "sppara":
            return lambda x, kernel, *rest: call(x, _with_tap(kernel), *rest)
        if not (isinstance(module, Dense) and is_prunable("/".join(module.path))):
            return call

        def updated(x: Vectors) -> Float[Array, "... f"]:
            if module.name == "wo":
                x = self._gate(-1, module, x)
            y = call(x)
            if not self.rank:
                return y
            inputs, outputs = module.kernel_axes  # "kv" is an axis that T5X never divides
            a = new_leaf("pruning_rows", _START, (x.shape[-1], self.rank), (inputs, "kv"))
            b = new_leaf("pruning_columns", _ZEROS, (self.rank, module.features), ("kv", outputs))
            return y + product(product(x, a.astype(y.dtype)), b.astype(y.dtype))

        return updated

    def _gate(self, axis: int, module: nn.Module, values: Array) -> Array:
        """What heads, or hidden channels, give; zero where they are gone."""
        number = values.shape[axis]
        mask = new_leaf(MASK, _ONES, (number,), ("heads" if axis == 1 else "mlp",))
        norms = jnp.zeros(number)
        if self.criterion == "weight" and not module.is_initializing():
            norms = group_norms(module.parent.variables["params"], number)
        return gated(axis, self.criterion, values, mask, norms)

    def _wrap_blocks(self, call: Call, module: nn.Module) -> Call:
        if module.path in (("encoder",), ("decoder",)):
            return lambda *arguments, **options: self._with_prototypes(
                module, call, arguments, options
            )
        if not (isinstance(module, Dense) and is_prunable("/".join(module.path))):
            return call

        def updated(x: Vectors) -> Float[Array, "... f"]:
            y = call(x)  # which makes the leaves; nobody reads it otherwise
            kernel = module.variables["params"]["kernel"]
            blocks = tuple(size // self.block for size in kernel.shape)
            mask = new_leaf(MASK, _ONES, blocks, ("length", "stack"))
            shape, axes = (self.prototypes, *blocks), ("kv", "length", "stack")
            weights = new_leaf("pruning_weights", _ZEROS, shape, axes)
            kernel = masked_blocks(kernel + kronecker(weights, _prototypes.get()), mask)
            bias = module.variables["params"]["bias"].astype(y.dtype) if module.use_bias else 0
            heads = module.input_heads, module.output_heads
            return product(x, kernel.astype(y.dtype), *heads) + bias

        return updated

    def _with_prototypes(self, module: nn.Module, call: Call, arguments, options):
        """Calls a stack with the prototypes, which are the encoder's leaves, for its layers."""
        if module.path == ("encoder",):
            columns, rows = (
                new_leaf(
                    f"pruning_prototype_{x}", nn.initializers.normal(self.block**-0.5), shape, axes
                )
                for x, shape, axes in (
                    (
                        "columns",
                        (self.prototypes, self.block, self.rank),
                        ("kv", "length", "stack"),
                    ),
                    ("rows", (self.prototypes, self.rank, self.block), ("kv", "stack", "length")),
                )
            )
        else:
            leaves = module.scope.root.variables()["params"]["encoder"]
            columns, rows = (leaves[f"pruning_prototype_{x}"] for x in ("columns", "rows"))
        with _given(jnp.einsum("pir,prj->pij", columns, rows)):
            return call(*arguments, **options)

    def wrap_optimizer(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Adds up scores, which are the masks' gradients, and takes groups away when it is time."""

        def init(params):
            leaves = trees.flatten(params)
            if not self.rank and not has_kernels(leaves):
                raise ValueError("StructuredPruning.rank=0 is for METHODS that train all: 'full'")
            masks = masks_of(leaves)
            scores = trees.unflatten({path: jnp.zeros_like(mask) for path, mask in masks.items()})
            return PruningState(jnp.zeros((), jnp.int32), scores, optimizer.init(params))

        def update(updates, state, params=None):
            flat, leaves = trees.flatten(updates), trees.flatten(params)
            masks, step = masks_of(leaves), state.step + 1
            before = trees.flatten(state.scores)
            scores = {path: self._added(before[path], flat[path]) for path in masks}
            silent = {path: jnp.zeros_like(x) if path in masks else x for path, x in flat.items()}
            inner_updates, inner = optimizer.update(trees.unflatten(silent), state.inner, params)
            due, density = self.schedule.due(step), self.schedule.density_after(step)
            chosen = lax.cond(
                due, lambda: self._chosen(scores, masks, leaves, density), lambda: masks
            )
            changes = {path: chosen[path] - masks[path] for path in masks}
            if self.kind != "splopa":  # movement adds up over the whole run
                scores = {path: jnp.where(due, 0, score) for path, score in scores.items()}
            flat = trees.flatten(inner_updates) | changes
            return trees.unflatten(flat), PruningState(step, trees.unflatten(scores), inner)

        return optax.GradientTransformation(init, update)

    def _added(self, score: Array, gradient: Array) -> Array:
        if self.kind == "splopa":
            return score - gradient  # of a mask: the sum of W x its gradient
        return gradient if self.criterion == "weight" else score + gradient

    def _chosen(self, scores, masks, leaves, density):
        if self.kind == "splopa":
            one = dict.fromkeys(masks, 1)
            return keep_best(scores, masks, one, dict.fromkeys(masks, 1), density)
        least = {path: LEAST_HEADS if is_of_heads(path) else LEAST_CHANNELS for path in masks}
        if self.scope == "global":
            costs = {path: cost_of(path, mask.size, leaves) for path, mask in masks.items()}
            return keep_best(scores, masks, costs, least, density)
        # Checkpoints of Hugging Face have one position bias for the heads of all layers.
        together = {p: without_layer(p) if is_of_heads(p) else p for p in masks}
        return keep_best_of_each(scores, masks, least, density, together)

    def progress(self, params: Mapping[str, Any]) -> dict[str, float]:
        """The density, and the groups that are left in each set."""
        leaves = trees.flatten(params)
        masks = masks_of(leaves)
        kept = {path: float(mask.sum()) for path, mask in masks.items()}
        costs = {path: cost_of(path, mask.size, leaves) for path, mask in masks.items()}
        total = sum(costs[path] * mask.size for path, mask in masks.items())
        density = sum(costs[path] * kept[path] for path in masks) / total
        sets = {f"kept/{path.removesuffix('/' + MASK)}": number for path, number in kept.items()}
        return {"density": density, **sets}

    def wrap_flops(self, flops: LayerFlops, place: Place, config: Any) -> LayerFlops:
        """Two thin products beside each prunable matrix, and gates; what is gone costs the same."""
        if self.kind == "splopa":
            return flops
        targets = targets_of(config, place)
        gates = sum(t.inputs for t in targets if t.path.endswith(("/out", "/wo")))

        def updated(tokens, context):
            rows = {"tokens": tokens, "context": context}
            sizes = sum(rows[target.rows] * (target.inputs + target.outputs) for target in targets)
            return flops(tokens, context) + 2 * self.rank * sizes + gates * tokens

        return updated

    def call_flops(self, place: Place, config: Any) -> float:
        """The sums of prototypes, which make matrices of the size of W, and the blocks' masks."""
        if self.kind != "splopa":
            return 0.0
        sizes = sum(target.inputs * target.outputs for target in targets_of(config, place))
        return 2 * (self.prototypes + 1) * sizes

    def merge(self, config: Any, params: Mapping[str, Any]) -> tuple[None, Mapping[str, Any]]:
        """Nothing of the method, and matrices with their updates and without what is gone.

        They keep their sizes: `commands.prune` cuts them.
        """
        del config
        leaves = trees.flatten(params)
        own = {p: leaves.pop(p) for p in [*leaves] if trees.matches(p, self.creates)}
        for path in [path for path in leaves if path.endswith("kernel")]:
            module, _, name = path.rpartition("/")
            found = {
                p.removeprefix(f"{module}/"): x
                for p, x in own.items()
                if p.startswith(f"{module}/")
            }
            kernel = jnp.asarray(leaves[path], jnp.float32)
            merged = self._merged(name, kernel, found, own)
            leaves[path] = merged.astype(leaves[path].dtype)
        if self.kind != "splopa":
            for path, mask in masks_of(own).items():
                silence(leaves, path, jnp.asarray(mask))
        return None, trees.unflatten(leaves)

    def _merged(self, name: str, kernel: Array, found: Mapping[str, Any], own: Mapping[str, Any]):
        """A matrix, or a convolution's kernel, with what was learned beside it."""
        if "pruning_rows" in found:
            a, b = (jnp.asarray(found[f"pruning_{x}"]) for x in ("rows", "columns"))
            return kernel + a @ b
        if "pruning_weights" in found:
            columns, rows = (
                jnp.asarray(own[f"encoder/pruning_prototype_{x}"]) for x in ("columns", "rows")
            )
            prototypes = jnp.einsum("pir,prj->pij", columns, rows)
            kernel += kronecker(jnp.asarray(found["pruning_weights"]), prototypes)
            return masked_blocks(kernel, jnp.asarray(found[MASK]))
        if name == "depthwise_kernel" and "depthwise/pruning_tap" in found:
            return kernel.at[len(kernel) // 2].add(jnp.asarray(found["depthwise/pruning_tap"]))
        return kernel

    def finish(
        self, config: Any, params: Mapping[str, Any]
    ) -> tuple["StructuredPruning", Mapping[str, Any]]:
        """The adapters' entries of groups that are gone are zero."""
        del config
        leaves = trees.flatten(params)
        if self.kind != "splopa" and self.rank:
            for path, mask in masks_of(leaves).items():
                silence(leaves, path, jnp.asarray(mask), "pruning_columns", "pruning_rows")
        return self, trees.unflatten(leaves)


_prototypes: contextvars.ContextVar[Array] = contextvars.ContextVar("prototypes")


@contextlib.contextmanager
def _given(prototypes: Array) -> Iterator[None]:
    token = _prototypes.set(prototypes)
    try:
        yield
    finally:
        _prototypes.reset(token)


def _with_tap(kernel: Float[Array, "w d"]) -> Float[Array, "w d"]:
    tap = new_leaf("pruning_tap", _ZEROS, kernel.shape[1:], ("embed",))
    return jnp.asarray(kernel).at[len(kernel) // 2].add(tap.astype(kernel.dtype))
