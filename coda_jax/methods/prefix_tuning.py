"""Prefix tuning: learned keys and values before those of every attention.

Axis letters: L places of the prefix, H heads, K head_dim, F = H K.
Reference: Li & Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation.
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
from coda_jax.nn.attention import DotProductAttention
from coda_jax.nn.dot_product_attention import split_heads
from coda_jax.nn.layers import Dense
from coda_jax.nn.position_bias import PositionBias
from coda_jax.nn.visibility import Visibility


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Method):
    """softmax(q [K_prefix; K]^T + [0; bias]) [V_prefix; V], for the tokens that a layer works on.

    The prefix has no position, and is not masked. In training it comes out of a small network,
    tanh(E W_in + b_in) W_out + b_out, which `finish` drops.

    Attributes:
        length: L.
        hidden: width of that network; 0 for keys and values that are learned themselves.
    """

    name: ClassVar[str] = "prefix_tuning"
    creates: ClassVar[tuple[str, ...]] = (r"/prefix/",)
    starts_as_base: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    profile_scopes: ClassVar = {"prefix": ("prefix",)}

    length: int = 16
    hidden: int = 512

    @classmethod
    def examples(cls) -> tuple["PrefixTuning", ...]:
        """With the network of training, and as it is exported."""
        return cls(length=5, hidden=8), cls(length=5, hidden=0)

    def __post_init__(self):
        checks.fields(self, length=checks.COUNT, hidden=checks.Whole(0))

    def wrap_module(self, call: Call, module: nn.Module) -> Call:
        """Attention to the prefix as well."""
        if not isinstance(module, DotProductAttention):
            return call

        def prefixed(query, key, value, bias, mask, *, source=None, **options):
            del source  # of all keys but the prefix's
            rows, heads, _, head_dim = key.shape
            made = Prefix(self.length, self.hidden, name="prefix")(heads * head_dim)
            key, value = (
                jnp.concatenate([split_heads(_repeated(new, rows, old.dtype), heads), old], axis=2)
                for new, old in zip(made, (key, value), strict=True)
            )
            bias, mask = _after(self.length, bias, 0), _after(self.length, mask, True)
            return call(query, key, value, bias, mask, **options)

        return prefixed

    def wrap_flops(self, flops: LayerFlops, place: Place, config: Any) -> LayerFlops:
        """L more keys and values in each attention."""
        widths = _widths(config, place)
        return lambda tokens, context: (
            flops(tokens, context) + 2 * 2 * tokens * self.length * sum(widths)
        )

    def call_flops(self, place: Place, config: Any) -> float:
        """Those of the network that makes the prefix."""
        widths = _widths(config, place)
        return sum(2 * self.length * self.hidden * 3 * width for width in widths)

    def finish(
        self, config: Any, params: Mapping[str, Any]
    ) -> tuple["PrefixTuning", Mapping[str, Any]]:
        """The keys and values themselves, in the place of the network that made them."""
        del config
        if not self.hidden:
            return self, params
        leaves = trees.flatten(params)
        for path in [path for path in leaves if path.endswith("/prefix/embedding")]:
            start, dtype = path.removesuffix("embedding"), leaves[path].dtype
            network = {
                p.removeprefix(start): leaves.pop(p) for p in [*leaves] if p.startswith(start)
            }
            width = network["embedding"].shape[1]
            made = Prefix(self.length, self.hidden).apply(
                {"params": trees.unflatten(network)}, width
            )
            for name, array in zip(("key", "value"), made, strict=True):
                leaves[start + name] = array.astype(dtype)
        return dataclasses.replace(self, hidden=0), trees.unflatten(leaves)


def _widths(config, place):
    """Of the keys of each attention of a layer."""
    return [p.outputs for p in config.projections(place) if p.path.endswith("/key")]


def _after(length, x, value):
    """A bias or a mask with so many keys before the others, for which it has one value."""
    if isinstance(x, PositionBias | Visibility):
        return x.replace(prefix=length)
    before = ((0, 0), (0, 0), (0, 0), (length, 0))
    return x if x is None else jnp.pad(x, before, constant_values=value)


def _repeated(x, rows, dtype):
    return jnp.broadcast_to(x.astype(dtype), (rows, *x.shape))


class Prefix(nn.Module):
    """The keys and values of a prefix, in float32.

    Attributes:
        length: L.
        hidden: width of the network that makes them; 0 for none.
    """

    length: int
    hidden: int

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Array, "l f"], Float[Array, "l f"]]:
        """(keys, values), each [L, F], F the given width."""
        if not self.hidden:
            start = nn.initializers.normal(1.0)
            return self._leaf("key", start, width), self._leaf("value", start, width)
        embedding = self._leaf("embedding", nn.initializers.normal(1.0), width)
        wi = Dense(self.hidden, ("joined_kv", "mlp"), use_bias=True, name="wi")
        wo = Dense(2 * width, ("mlp", "joined_kv"), use_bias=True, name="wo")
        return tuple(jnp.split(wo(jnp.tanh(wi(embedding))), 2, axis=-1))

    def _leaf(self, name, start, width):
        return partitioning.param_with_axes(
            name, start, (self.length, width), jnp.float32, axes=("kv", "joined_kv")
        )
