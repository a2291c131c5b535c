"""Which keys the queries of an attention may see.

Axis letters: B batch, Q queries, L keys.
"""

from flax import struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Visibility:
    """What a query may attend to: an array of queries and keys, once it is needed.

    Attributes:
        keys: [B, L], False for padding.
        query_segments: [B, Q], which of the row's packed examples it is of; None without packing.
        key_segments: [B, L] likewise. A query sees its own segment only.
        query_positions: [B or 1, Q] where a query sees the keys up to its own position alone.
        key_positions: [B or 1, L] likewise.
        prefix: so many keys stand before the L others, and every query sees them.
    """

    keys: Bool[Array, "b l"]
    query_segments: Int[Array, "b q"] | None = None
    key_segments: Int[Array, "b l"] | None = None
    query_positions: Int[Array, "#b q"] | None = None
    key_positions: Int[Array, "#b l"] | None = None
    prefix: int = struct.field(pytree_node=False, default=0)

    @property
    def same_for_all_queries(self) -> bool:
        """Whether the array has one entry a key."""
        return self.query_segments is None and self.query_positions is None

    def array(self) -> Bool[Array, "b 1 _ l"]:
        """[B, 1, Q or 1, prefix + L], True where the query sees the key."""
        visible = self.keys[:, None, None, :]
        if self.query_segments is not None:
            same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
            visible = visible & same[:, None]
        if self.query_positions is not None:
            before = self.key_positions[:, None, :] <= self.query_positions[:, :, None]
            visible = visible & before[:, None]
        if self.prefix:
            before = ((0, 0), (0, 0), (0, 0), (self.prefix, 0))
            visible = jnp.pad(visible, before, constant_values=True)
        return visible
