"""Attention with a learned vector for each distance between a query and a key.

Axis letters: B batch, N tokens (Q queries, L keys), D embedding, H heads, R distances, W waves.
"""

import functools

from flax import linen as nn
from flax.linen import partitioning
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from coda_jax.nn import layers
from coda_jax.nn.attention import DotProductAttention
from coda_jax.nn.dot_product_attention import join_heads, split_heads
from coda_jax.nn.layers import Dense, Dtype
from coda_jax.nn.visibility import Visibility


class RelativeKeyAttention(nn.Module):
    """softmax((q k^T + q E[distance]^T) / sqrt(head_dim)) v, with a learned vector per distance.

    Attributes:
        num_heads: H.
        head_dim: of each head.
        max_left: keys that lie further before the query share a vector.
        max_right: keys that lie further behind it share a vector.
        dropout_rate: on the attention weights.
        float32_logits: whether logits and softmax are float32 where `dtype` is not.
        dtype: of the computation.

    Reference: Shaw et al. 2018, Self-Attention with Relative Position Representations.
    """

    num_heads: int
    head_dim: int
    max_left: int
    max_right: int
    dropout_rate: float = 0.0
    float32_logits: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_q: Float[Array, "b q d"],
        x_kv: Float[Array, "b l d"],
        mask: Visibility | Bool[Array, "b 1 #q l"],
        query_positions: Int[Array, "_ q"],
        key_positions: Int[Array, "_ l"],
        *,
        deterministic: bool,
    ) -> Float[Array, "b q d"]:
        """Attends from x_q to x_kv where the mask allows; positions are in time."""

        def heads(name, x):
            width = self.num_heads * self.head_dim
            x = Dense(width, ("embed", "joined_kv"), use_bias=True, dtype=self.dtype, name=name)(x)
            return split_heads(x, self.num_heads)

        query = heads("query", x_q) * self.head_dim**-0.5
        dropout = None
        if self.dropout_rate and not deterministic:
            dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,), deterministic=False)
        y = DotProductAttention(self.float32_logits, dropout, name="dot_product")(
            query,
            heads("key", x_kv),
            heads("value", x_kv),
            self._position_term(query, query_positions, key_positions),
            mask,
        )
        return Dense(
            x_q.shape[-1], ("joined_kv", "embed"), use_bias=True, dtype=self.dtype, name="out"
        )(join_heads(y))

    def _position_term(self, query, query_positions, key_positions) -> Float[Array, "b h q l"]:
        embedding = partitioning.param_with_axes(
            "distance_embedding",
            nn.initializers.normal(1.0),
            (self.max_left + 1 + self.max_right, self.head_dim),
            jnp.float32,
            axes=("relpos_buckets", "kv"),
        )
        return lax.platform_dependent(
            query,
            embedding,
            query_positions,
            key_positions,
            tpu=functools.partial(_from_waves, max_left=self.max_left),
            default=functools.partial(_looked_up, max_left=self.max_left),
        )


def _looked_up(query, embedding, query_positions, key_positions, *, max_left):
    # Distances are few: one product per query and distance, then a look-up for each key.
    by_distance = layers.product(query, embedding.T.astype(query.dtype))
    distance = key_positions[:, None, :] - query_positions[:, :, None] + max_left
    distance = jnp.clip(distance, 0, embedding.shape[0] - 1)
    return jnp.take_along_axis(by_distance, distance[:, None], axis=-1, mode="promise_in_bounds")


def _from_waves(query, embedding, query_positions, key_positions, *, max_left):
    """The look-up as a product, since TPUs gather slowly; right for any positions.

    What a query gives each distance is a sum of waves (a Fourier series), and a wave at l - q is a
    product of sines and cosines at q and at l. Waves repeat after the last distance, so keys that
    lie further take the first or the last distance's value.
    """
    num_distances = embedding.shape[0]
    period = num_distances // 2 * 2 + 1  # odd, so that each frequency but 0 has two waves
    frequencies = np.arange(period // 2 + 1)
    product = functools.partial(
        jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    angles = np.arange(num_distances)[:, None] * frequencies * (2 * np.pi / period)
    amplitudes = np.where(frequencies == 0, 1, 2) / period
    columns = [
        product("rd,rw->dw", embedding, (amplitudes * np.cos(angles)).astype(np.float32)),
        product("rd,rw->dw", embedding, (amplitudes * np.sin(angles)).astype(np.float32)),
        embedding[:1].T,
        embedding[-1:].T,
    ]
    by_column = product(
        "bhqd,dw->bhqw", query, jnp.concatenate(columns, axis=1).astype(query.dtype)
    )
    ends = np.cumsum([len(frequencies), len(frequencies), 1])
    cosine, sine, first, last = jnp.split(by_column, ends, axis=-1)
    # Counted from the first distance on, as the angles are.
    cosine_q, sine_q = _waves(query_positions - max_left, frequencies, period)
    cosine_q, sine_q = cosine_q[:, None], sine_q[:, None]
    of_query = [cosine * cosine_q - sine * sine_q, cosine * sine_q + sine * cosine_q]
    of_key = jnp.concatenate(_waves(key_positions, frequencies, period), axis=-1)
    near = product(
        "bhqw,blw->bhql",
        jnp.concatenate(of_query, axis=-1).astype(query.dtype),
        jnp.broadcast_to(of_key, (query.shape[0], *of_key.shape[1:])).astype(query.dtype),
    )
    distance = (key_positions[:, None, :] - query_positions[:, :, None] + max_left)[:, None]
    term = jnp.where(distance > 0, near, first)
    return jnp.where(distance < num_distances - 1, term, last).astype(query.dtype)


def _waves(positions, frequencies, period):
    """(cosines, sines) [B, N, W] at positions [B, N]; whole periods are left out before."""
    steps = (positions % period)[..., None] * frequencies % period
    angles = steps.astype(jnp.float32) * np.float32(2 * np.pi / period)
    return jnp.cos(angles), jnp.sin(angles)
