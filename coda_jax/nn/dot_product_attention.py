"""softmax(q k^T + bias) v, in the way that is fastest on each platform.

Axis letters: B batch, N tokens (Q queries, L keys), D embedding, H heads.
"""

from collections.abc import Callable
import functools
import math

from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coda_jax.nn import attention_kernel, long_attention, processors
from coda_jax.nn.cuda import with_kernel
from coda_jax.nn.position_bias import PositionBias, look_up
from coda_jax.nn.visibility import Visibility
from coda_jax.sharding import num_parts

# From this many keys on XLA has a kernel for softmax and average on TPUs, if they fill its tiles.
_FUSED_LENGTH = 512
_TILE = 128
# Queries of all heads up to which a TPU's matrix unit is not full.
_FEW_QUERIES = 128
# Logits of all heads and rows that a TPU keeps near its units, in float32.
_LOGITS_ON_CHIP = 2**24
# Logits of a head that a CPU keeps in its caches, about, and those that are worth a loop's round.
_CACHED_LOGITS = 2**20
_WORTH_A_ROUND = 2**14
# Rows of a source, as a multiple of its width, from which on its matrices are worth reading.
_WORTH_A_SOURCE = 8
# What keys and values are products of, and the matrices; see `attend`.
Source = tuple[Float[Array, "c l d"], Float[Array, "d h k"], Float[Array, "d h k"]]


def attend(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    bias: Float[Array, "..."] | PositionBias | None,
    mask: Bool[Array, "..."] | Visibility | None,
    *,
    float32_logits: bool = False,
    dropout: Callable[[Array], Array] | None = None,
    source: Source | None = None,
) -> Float[Array, "b h q k"]:
    """softmax(q k^T + bias) v over the keys that the mask allows; T5 does not scale the logits.

    Args:
        query: [B, H, Q, head_dim].
        key: [B, H, L, head_dim].
        value: [B, H, L, head_dim].
        bias: that of a distance, or an array that broadcasts to [B, H, Q, L].
        mask: that of tokens, or an array that broadcasts to [B, H, Q, L]. A query that may see no
            key gets the mean of the values.
        float32_logits: whether logits and softmax are float32 where the computation is not. (Where
            that costs nothing, they always are.)
        dropout: applied to the attention weights, if there is any; the same for all queries.
        source: what keys and values are products of, if it is at hand: x [B, L, D] and the matrices
            of `Attention.matrices`.
    """
    if long_attention.takes(query, key, bias, mask):
        return _attend_long(query, key, value, bias, mask, dropout)
    mask = mask.array() if isinstance(mask, Visibility) else mask
    array = bias.array() if isinstance(bias, PositionBias) else bias
    arguments = query, key, value, array, mask
    options = {"float32_logits": float32_logits}
    if dropout is not None:
        return _attend(*arguments, **options, dropout=dropout)
    default = functools.partial(_attend, **options)
    cpu = tpu = cuda = default
    num_groups = num_parts("heads", query.shape[1])
    few = query.shape[1] // num_groups * query.shape[2] <= _FEW_QUERIES
    in_one_product = functools.partial(_attend_with_few_queries, num_groups)
    if num_groups * num_parts("batch", query.shape[0]) == 1:
        if key.dtype == jnp.bfloat16:
            if processors.multiplies_bfloat16():
                cpu = in_one_product if few else _attend_in_blocks
        elif query.shape[2] * key.shape[2] > _WORTH_A_ROUND:
            cpu = _attend_in_blocks
        if not few and attention_kernel.takes(query, bias, mask):
            plain = functools.partial(_attend_to_arrays, float32_logits)
            cuda = functools.partial(_attend_by_kernel, plain, bias)
    if few:
        tpu = in_one_product
        if source is not None and _is_worth_reading(source[0], key):
            tpu = functools.partial(_attend_to_source, source)
    elif key.shape[2] < _FUSED_LENGTH or key.shape[2] % _TILE:
        tpu = functools.partial(_attend, **options, average=_average_with_sum)
    elif math.prod(query.shape[:3]) * key.shape[2] <= _LOGITS_ON_CHIP:
        tpu = _attend_in_float32
    return lax.platform_dependent(*arguments, cpu=cpu, tpu=tpu, cuda=cuda, default=default)


def _attend_long(query, key, value, bias, mask, dropout):
    """Without an array of all queries and keys, and on GPUs by the kernel where it takes that."""
    if dropout is not None:
        # What drops a key drops it for all queries: as well its value.
        kept = dropout(jnp.ones((*key.shape[:2], 1, key.shape[2]), value.dtype))
        value = value * jnp.swapaxes(kept, 2, 3)
    default = cuda = functools.partial(_attend_to_tokens, bias)
    undivided = num_parts("heads", query.shape[1]) * num_parts("batch", query.shape[0]) == 1
    if undivided and attention_kernel.takes(query, bias, mask):
        cuda = functools.partial(_attend_by_kernel, _attend_to_tokens, bias)
    return lax.platform_dependent(query, key, value, None, mask, cuda=cuda, default=default)


def _is_worth_reading(x, key):
    """Whether keys are products of x, and x has many more rows than their matrix."""
    rows, length, width = x.shape
    return length == key.shape[2] and rows * length >= _WORTH_A_SOURCE * width


def _average(logits, value, dropout, einsum=jnp.einsum):
    weights = jax.nn.softmax(logits).astype(value.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return einsum("bhql,bhld->bhqd", weights, value).astype(value.dtype)


def _attend(query, key, value, bias, mask, *, float32_logits, dropout=None, average=_average):
    if float32_logits:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = _biased(jnp.einsum("bhqd,bhld->bhql", query, key), bias, mask)
    return average(logits, value, dropout)


def _attend_in_float32(query, key, value, bias, mask):
    """As `_attend`, with products that name float32 as the type of their results."""
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = _biased(einsum("bhqd,bhld->bhql", query, key), bias, mask)
    return _average(logits, value, None, einsum)


@jax.custom_jvp
def _attend_in_blocks(query, key, value, bias, mask):
    """One head of one row after the other, in blocks of queries whose logits fit a CPU's caches.

    Differentiated as a whole: the loops' own derivative is slower.
    """
    rows, heads, length, _ = query.shape
    blocks = -(-length // max(_CACHED_LOGITS // key.shape[2], 1))
    size = -(-length // blocks)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend_head(index):
        def of_head(x):
            if x is None:
                return None
            row, head = index // heads, index % heads
            return jnp.asarray(x)[row if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]

        q, k, v, head_bias, head_mask = map(of_head, (query, key, value, bias, mask))

        def attend_block(block):
            def of_block(x):
                if x is None or x.shape[0] == 1:
                    return x
                # A slice that would end behind the last query starts earlier.
                return lax.dynamic_slice_in_dim(x, block * size, size)

            logits = product("qd,ld->ql", of_block(q), k)
            logits = _biased(logits, of_block(head_bias), of_block(head_mask))
            exponentials = jnp.exp(logits - logits.max(-1, keepdims=True))
            # The average is divided by the weights' sum, and not the weights: it is smaller.
            sums = product("ql,ld->qd", exponentials.astype(v.dtype), v)
            return (sums / exponentials.sum(-1, keepdims=True)).astype(v.dtype)

        return lax.map(attend_block, jnp.arange(blocks))

    y = lax.map(attend_head, jnp.arange(rows * heads)).reshape(rows, heads, blocks, size, -1)
    last = length - (blocks - 1) * size
    whole = y[:, :, :-1].reshape(rows, heads, length - last, value.shape[-1])
    return jnp.concatenate([whole, y[:, :, -1, size - last :]], axis=2)


@_attend_in_blocks.defjvp
def _attend_in_blocks_jvp(primals, tangents):
    return jax.jvp(_attend_in_float32, primals, tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_by_kernel(plain, bias, query, key, value, array, mask):
    """By `attention_kernel`; the derivative is that of a function of the same arguments."""
    del plain, array
    mask = mask.array() if isinstance(mask, Visibility) else mask
    seen = jnp.ones((1, 1), bool) if mask is None else mask[:, 0, 0]
    distances = ()
    if bias is not None:
        distances = bias.by_distance(), bias.query_positions, bias.key_positions
    (y,) = _in_kernel(
        *(join_heads(x) for x in (query, key, value)),
        jnp.broadcast_to(seen, (key.shape[0], key.shape[2])),
        *distances,
        num_heads=query.shape[1],
    )
    return split_heads(y, query.shape[1])


@_attend_by_kernel.defjvp
def _attend_by_kernel_jvp(plain, primals, tangents):
    return jax.jvp(plain, primals, tangents)


def _attend_to_arrays(float32_logits, bias, *arguments):
    del bias  # of which the array was made
    return _attend(*arguments, float32_logits=float32_logits)


def _attend_to_tokens(bias, query, key, value, array, mask):
    del array  # of the bias, which long inputs have none of
    return long_attention.attend(query, key, value, bias, mask)


def _attend_joined(query, key, value, mask, *distances, num_heads):
    """What `attention_kernel.attend` computes."""
    heads = [split_heads(x, num_heads) for x in (query, key, value)]
    bias = look_up(*distances) if distances else None
    return (join_heads(_attend(*heads, bias, mask[:, None, None], float32_logits=True)),)


_in_kernel = with_kernel(
    _attend_joined,
    attention_kernel.attend,
    lambda query, *_, num_heads: [jax.ShapeDtypeStruct(query.shape, query.dtype)],
)


def _biased(logits, bias, mask):
    if bias is not None:
        logits += bias.astype(logits.dtype)
    if mask is not None:
        # Finite in every type: where nothing is seen, all of -inf would be NaN.
        masked = max(attention_kernel.MASKED_LOGIT, float(jnp.finfo(logits.dtype).min))
        logits = jnp.where(mask, logits, jnp.asarray(masked, logits.dtype))
    return logits


def _attend_with_few_queries(num_groups, query, key, value, bias, mask):
    """One product for all heads of a group: their queries stand on the diagonal of [H, H head_dim].

    For a decoding step, which waits for keys and values: [L, head_dim] for each head fills half of
    a TPU's tiles, [L, H head_dim] all of them. Heads of different chips are in different groups, or
    else their logits would be added up over the chips. Few logits gain nothing
    from bfloat16.
    """
    num_heads, head_dim = query.shape[1] // num_groups, query.shape[3]
    diagonal = jnp.repeat(jnp.eye(num_heads, dtype=bool), head_dim, axis=1)

    def joined(x):
        return join_heads(x).reshape(x.shape[0], x.shape[2], num_groups, -1)

    rows, float32 = jnp.where(diagonal, joined(query)[..., None, :], 0), jnp.float32
    logits = jnp.einsum("bqghj,blgj->bghql", rows, joined(key), preferred_element_type=float32)
    logits = logits.reshape(query.shape[0], -1, *logits.shape[3:])
    weights = jax.nn.softmax(_biased(logits, bias, mask)).astype(value.dtype)
    weights = weights.reshape(query.shape[0], num_groups, -1, key.shape[2])
    y = jnp.einsum("bgml,blgj->bgmj", weights, joined(value), preferred_element_type=float32)
    y = y.reshape(*y.shape[:2], num_heads, -1, y.shape[-1])
    y = jnp.where(diagonal[:, None], y, 0).sum(2).astype(value.dtype)
    return jnp.swapaxes(y.reshape(*y.shape[:3], num_heads, head_dim), 2, 3).reshape(query.shape)


def _attend_to_source(source, query, key, value, bias, mask):
    """Without keys and values: q (x W)^T = (q W^T) x^T, and w (x W) = (w x) W.

    For a decoding step, which waits for what it reads: x is the same for all layers, for keys and
    for values.
    """
    del key, value
    x, key_matrix, value_matrix = source
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    rows = product("bhqk,dhk->bhqd", query, key_matrix).astype(x.dtype)
    logits = _biased(product("bhqd,bld->bhql", rows, x), bias, mask)
    weights = jax.nn.softmax(logits).astype(x.dtype)
    means = product("bhql,bld->bhqd", weights, x).astype(x.dtype)
    return product("bhqd,dhk->bhqk", means, value_matrix).astype(x.dtype)


def _average_with_sum(logits, value, dropout):
    """With the softmax's denominator as one more column of the values, which a TPU has room for."""
    del dropout
    highest = lax.stop_gradient(logits.max(-1, keepdims=True))
    exponentials = jnp.exp((logits - highest).astype(jnp.float32)).astype(value.dtype)
    ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
    sums = jnp.einsum(
        "bhql,bhld->bhqd",
        exponentials,
        jnp.concatenate([value, ones], axis=-1),
        preferred_element_type=jnp.float32,
    )
    return (sums[..., :-1] / sums[..., -1:]).astype(value.dtype)


def split_heads(x: Float[Array, "b n j"], num_heads: int) -> Float[Array, "b h n k"]:
    """[B, N, H * head_dim] -> [B, H, N, head_dim], as the matrix products want it."""
    x = x.reshape(*x.shape[:-1], num_heads, -1)
    x = partitioning.with_sharding_constraint(x, ("batch", "length", "heads", "kv"))
    return jnp.swapaxes(x, 1, 2)


def join_heads(x: Float[Array, "b h n k"]) -> Float[Array, "b n j"]:
    """The inverse of `split_heads`."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(*x.shape[:-2], -1)
