"""Multi-head attention: its projections, and the cache of a decoder.

Axis letters: B batch, N tokens (Q queries, L keys), D embedding, H heads.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.nn.dot_product_attention import Source, attend, join_heads, split_heads
from coda_jax.nn.layers import Dense, Dtype, Vectors
from coda_jax.nn.position_bias import PositionBias
from coda_jax.nn.visibility import Visibility

_fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class DotProductAttention(nn.Module):
    """`attend` as a module without parameters, so that methods can be put around it.

    Attributes:
        float32_logits: whether logits and softmax are float32 where the computation is not.
        dropout: applied to the attention weights, if there is any.
    """

    float32_logits: bool = False
    dropout: Callable[[Array], Array] | None = None

    @nn.compact  # for what methods create
    def __call__(
        self,
        query: Float[Array, "b h q k"],
        key: Float[Array, "b h l k"],
        value: Float[Array, "b h l k"],
        bias: Float[Array, "..."] | PositionBias | None,
        mask: Bool[Array, "..."] | Visibility | None,
        *,
        source: Source | None = None,
    ) -> Float[Array, "b h q k"]:
        """See `attend`."""
        return attend(
            *(query, key, value, bias, mask),
            float32_logits=self.float32_logits,
            dropout=self.dropout,
            source=source,
        )


class Attention(nn.Module):
    """Multi-head attention without biases; keys and values may be made once and used often.

    Attributes:
        num_heads: H.
        head_dim: of each head.
        dropout_rate: on the attention weights.
        float32_logits: whether logits and softmax are float32 where `dtype` is not.
        dtype: of the computation.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    float32_logits: bool = False
    dtype: Dtype = jnp.float32

    def setup(self):
        def project(init):
            return Dense(
                self.num_heads * self.head_dim,
                ("embed", "joined_kv"),
                init,
                dtype=self.dtype,
                output_heads=self.num_heads,
            )

        # T5 folds the 1 / sqrt(head_dim) of the logits into the start of the query projection.
        self.query = project(lambda *args: _fan_in_normal(*args) * self.head_dim**-0.5)
        self.key = project(_fan_in_normal)
        self.value = project(_fan_in_normal)
        self.dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))

    def keys_values(self, x: Vectors) -> tuple[Float[Array, "b h l k"], Float[Array, "b h l k"]]:
        """The keys and values of x, each [B, H, L, head_dim]."""
        return tuple(split_heads(y, self.num_heads) for y in (self.key(x), self.value(x)))

    def matrices(self, width: int) -> tuple[Float[Array, "d h k"], Float[Array, "d h k"]]:
        """What keys and values are products of x [..., width] with, each [D, H, head_dim].

        Right for projections that are linear, whatever methods make of them.
        """
        identity = jnp.eye(width, dtype=self.dtype)
        return tuple(
            y(identity).reshape(width, self.num_heads, self.head_dim)
            for y in (self.key, self.value)
        )

    @nn.compact
    def __call__(
        self,
        x_q: Vectors,
        keys_values: tuple[Float[Array, "c h l k"], Float[Array, "c h l k"]],
        mask: Bool[Array, "..."] | Visibility | None = None,
        bias: Float[Array, "..."] | PositionBias | None = None,
        *,
        source: Source | None = None,
        deterministic: bool,
    ) -> Float[Array, "b q d"]:
        """Attends from x_q to keys and values that `keys_values` made.

        The keys may have fewer rows than the queries, [C, ...] with B = C * beams: the beams of a
        row then share its keys, and mask is that of the C rows. For source see `attend`.
        """
        key, value = keys_values
        query, dropout = self.query(x_q), None
        if self.dropout_rate and not deterministic:
            dropout = functools.partial(self.dropout, deterministic=False)
        y = DotProductAttention(self.float32_logits, dropout, name="dot_product")(
            split_heads(query.reshape(key.shape[0], -1, query.shape[-1]), self.num_heads),
            *(key, value, bias, mask),
            source=source,
        )
        return Dense(
            x_q.shape[-1],
            ("joined_kv", "embed"),
            _fan_in_normal,
            dtype=self.dtype,
            input_heads=self.num_heads,
            name="out",
        )(join_heads(y).reshape(query.shape))


def join_beams(x: Float[Array, "b h l k"], num_beams: int) -> Float[Array, "r h j k"]:
    """[R * beams, H, L, head_dim] -> [R, H, beams * L, head_dim]: what all beams of a row wrote."""
    x = x.reshape(-1, num_beams, *x.shape[1:])
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1, x.shape[4])


def beams_mask(ancestors: Int[Array, "r m l"]) -> Bool[Array, "r 1 m j"]:
    """[R, 1, M, M * L], what each beam sees of `join_beams`: at each place what one beam wrote."""
    beams = jnp.arange(ancestors.shape[1], dtype=jnp.int32)[:, None]
    seen = ancestors[:, None, :, None] == beams
    return seen.reshape(*seen.shape[:3], -1)


def causal(
    query_positions: Int[Array, "1 q"],
    num_keys: int,
    tree: Bool[Array, "q q"] | None = None,
    mask: Visibility | Bool[Array, "b 1 m j"] | None = None,
) -> tuple[tuple[Int[Array, "1 q"], Int[Array, "1 l"]], Bool[Array, "b 1 _ j"] | Visibility]:
    """((positions of the queries, of the keys), which keys each query sees): those up to itself.

    Args:
        query_positions: [1, Q], of the keys, which stand one behind the other.
        num_keys: L.
        tree: [Q, Q] which keys each query sees instead, itself included, where queries and keys are
            the nodes of a tree; as many as their depth, which is their position.
        mask: which of the keys there are; in cached decoding that of `beams_mask`, of the keys of
            all beams of a row.
    """
    if tree is not None:
        depths = tree.sum(-1, dtype=jnp.int32)[None]
        seen = tree[None, None]
        return (depths, depths), seen if mask is None else mask.array() & seen
    key_positions = jnp.arange(num_keys, dtype=jnp.int32)[None]
    positions = query_positions, key_positions
    if isinstance(mask, Visibility):
        return positions, mask.replace(query_positions=query_positions, key_positions=key_positions)
    visible = (key_positions[:, None, :] <= query_positions[:, :, None])[:, None]
    if mask is not None:
        visible = mask & jnp.tile(visible, mask.shape[-1] // num_keys)
    return positions, visible


_KEY, _VALUE = "cached_key", "cached_value"  # [B, H, L, head_dim] each
MATRICES = ("key_matrix", "value_matrix")  # those of `Attention.matrices`, in a decoder's cache


def widened_cache(cache: Mapping[str, Any], places: int) -> dict[str, Any]:
    """The cache of a decoder with `places` in all, the new ones empty."""

    def widened(path, leaf):
        if path[-1].key not in (_KEY, _VALUE):
            return leaf
        return jnp.pad(leaf, ((0, 0), (0, 0), (0, places - leaf.shape[2]), (0, 0)))

    return jax.tree_util.tree_map_with_path(widened, cache)


class KeyValueCache(nn.Module):
    """The keys and values of the tokens decoded so far.

    The first call, with arrays of the full length, makes an empty cache and returns its input.
    Each later call brings one position, which is written at the index.
    """

    @nn.compact
    def __call__(
        self, key: Float[Array, "b h n k"], value: Float[Array, "b h n k"]
    ) -> tuple[Float[Array, "b h l k"], Float[Array, "b h l k"], Int[Array, "1 q"]]:
        """(keys, values [B, H, L, head_dim], positions of the queries [1, Q])."""
        exists = self.has_variable("cache", _KEY)
        cached_key = self.variable("cache", _KEY, jnp.zeros_like, key)
        cached_value = self.variable("cache", _VALUE, jnp.zeros_like, value)
        index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        if not exists:
            return key, value, jnp.arange(key.shape[2], dtype=jnp.int32)[None]
        if key.shape[2] != 1:
            raise ValueError(f"cached decoding takes one token a step, got {key.shape[2]}")
        start = (0, 0, index.value, 0)
        cached_key.value = lax.dynamic_update_slice(cached_key.value, key, start)
        cached_value.value = lax.dynamic_update_slice(cached_value.value, value, start)
        position = index.value[None, None]
        index.value += 1
        return cached_key.value, cached_value.value, position
