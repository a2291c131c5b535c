"""What attention starts with."""

import jax
import jax.numpy as jnp

from coda_jax.nn import attention


def test_query_kernel_starts_small_enough_for_unscaled_logits():
    """Logits of unit-scale inputs have unit scale although T5 does not divide by sqrt(head_dim)."""
    module = attention.Attention(2, 64)
    x = jax.random.normal(jax.random.key(0), (1, 64, 128))
    params = module.init(
        jax.random.key(1),
        x,
        deterministic=True,
        method=lambda m, x, deterministic: m(x, m.keys_values(x), deterministic=deterministic),
    )["params"]
    q = (x @ params["query"]["kernel"]).reshape(1, 64, 2, 64)
    k = (x @ params["key"]["kernel"]).reshape(1, 64, 2, 64)
    assert 0.8 < float(jnp.einsum("bqhd,blhd->bhql", q, k).std()) < 1.25
