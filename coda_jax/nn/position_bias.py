"""T5's relative position bias.

Axis letters: B batch, Q queries, L keys, H heads.
"""

import functools

from flax import linen as nn
from flax import struct
from flax.linen import partitioning
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from coda_jax.nn.layers import Dtype


def relative_position_bucket(
    distance: np.ndarray, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """T5's bucket of each distance (key position - query position), as static numpy arithmetic.

    Half of the buckets hold one distance each, the other half grow in logarithmic steps up to
    `max_distance`, beyond which all share the last.
    """
    bucket = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += np.where(distance > 0, num_buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    max_exact = num_buckets // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / max_exact)
    ratio = ratio / np.float32(np.log(max_distance / max_exact))
    large = max_exact + (ratio * (num_buckets - max_exact)).astype(distance.dtype)
    return bucket + np.where(distance < max_exact, distance, np.minimum(large, num_buckets - 1))


@struct.dataclass
class PositionBias:
    """A bias that depends on the distance from a query to a key: an array, once it is needed.

    Attributes:
        values: [H, buckets], of each bucket.
        query_positions: [B or 1, Q] int32.
        key_positions: [B or 1, L] int32.
        bidirectional: whether keys after the query have buckets of their own.
        max_distance: all distances from here on share one bucket.
        prefix: so many keys stand before those of `key_positions`, and have no bias.
    """

    values: Float[Array, "h buckets"]
    query_positions: Int[Array, "#b q"]
    key_positions: Int[Array, "#b l"]
    bidirectional: bool = struct.field(pytree_node=False)
    max_distance: int = struct.field(pytree_node=False)
    prefix: int = struct.field(pytree_node=False, default=0)

    def array(self) -> Float[Array, "b h q l"]:
        """The bias of each query and key, [B, H, Q, prefix + L]."""
        selected = functools.partial(_bias_selected, buckets=self._buckets())
        bias = lax.platform_dependent(
            self.values,
            self.by_distance(),
            self.query_positions,
            self.key_positions,
            tpu=lambda values, _, *positions: selected(values, *positions),
            default=lambda _, *arguments: look_up(*arguments),
        )
        if self.prefix:
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (self.prefix, 0)))
        return bias

    def of_far_keys(self) -> tuple[Float[Array, "h"], Float[Array, "h"]]:
        """The bias of keys that lie `max_distance` or more before the query, and behind it."""
        buckets = self._buckets()
        return self.values[:, buckets[0]], self.values[:, buckets[-1]]

    def tile(self, times: int) -> "PositionBias":
        """That of so many copies of the keys, one behind the other."""
        return self.replace(key_positions=jnp.tile(self.key_positions, times))

    def by_distance(self) -> Float[Array, "h r"]:
        """The bias of each distance from -max_distance to max_distance."""
        return self.values[:, self._buckets()]

    def _buckets(self):
        # Distances are few and buckets static: one value per head and distance.
        limit = self.max_distance
        distances = np.arange(-limit, limit + 1)
        return relative_position_bucket(distances, self.bidirectional, self.values.shape[1], limit)


class RelativePositionBiases(nn.Module):
    """T5's relative position bias, computed from the positions of the queries and the keys.

    Attributes:
        num_buckets: number of learned values per head.
        max_distance: all distances from here on share one bucket.
        num_heads: H.
        bidirectional: whether keys after the query have buckets of their own.
        dtype: of the result.
    """

    num_buckets: int
    max_distance: int
    num_heads: int
    bidirectional: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, query_positions: Int[Array, "#b q"], key_positions: Int[Array, "#b l"]
    ) -> PositionBias:
        """The bias of each query and key."""
        rel_embedding = partitioning.param_with_axes(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (self.num_heads, self.num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        return PositionBias(
            rel_embedding.astype(self.dtype),
            query_positions,
            key_positions,
            self.bidirectional,
            self.max_distance,
        )


def look_up(
    by_distance: Float[Array, "h r"],
    query_positions: Int[Array, "#b q"],
    key_positions: Int[Array, "#b l"],
) -> Float[Array, "b h q l"]:
    """The bias of each query and key, from that of each distance as of `by_distance`."""
    limit = (by_distance.shape[1] - 1) // 2
    distance = key_positions[:, None, :] - query_positions[:, :, None]
    indices = jnp.clip(distance, -limit, limit) + limit
    return jnp.moveaxis(jnp.take(by_distance, indices, axis=1), 0, 1)


def _bias_selected(values, query_positions, key_positions, *, buckets):
    """By a tree of selects on the bits of the rank of the distance's bucket: TPUs gather slowly."""
    limit = (len(buckets) - 1) // 2
    distance = key_positions[:, None, :] - query_positions[:, :, None]
    distance = jnp.clip(distance, -limit, limit) + limit
    edges = np.flatnonzero(np.diff(buckets)) + 1
    rank = sum((distance >= edge).astype(jnp.int32) for edge in edges)[:, None]
    starts = buckets[np.concatenate([[0], edges])]
    level = [values[None, :, i, None, None] for i in starts]
    bit = 0
    while len(level) > 1:
        one = ((rank >> bit) & 1) != 0
        level = [
            jnp.where(one, *reversed(level[i : i + 2])) if i + 1 < len(level) else level[i]
            for i in range(0, len(level), 2)
        ]
        bit += 1
    return level[0]
