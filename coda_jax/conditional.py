"""The conditional layer: a frozen encoder layer that works on a few tokens, and an adapter on all.

Text, image and speech encoders share it; each brings its own frozen layer as a function.
"""

from collections.abc import Callable

from jaxtyping import Array, Float

from coda_jax.adapters import Adapter, AdapterConfig
from coda_jax.routing import CodaConfig, Router, Tokens

__all__ = ["CodaConfig", "conditional"]


def conditional(
    layer: Callable[[Tokens, Tokens], Float[Array, "b k d"]],
    tokens: Tokens,
    adapter: AdapterConfig | None,
    coda: CodaConfig | None,
    layer_index: int,
) -> Float[Array, "b n d"]:
    """y = x + Adapter(u) + scatter(m * (layer(x[idx]) - x[idx]), idx).

    Called within the compact method of a Flax module, whose scope gets the `adapter` and `router`
    parameters beside those of the layer.

    Args:
        layer: the frozen layer, residual connections included: (tokens to work on [B, K, D],
            tokens to attend to [B, K or N, D]) -> [B, K, D].
        tokens: all tokens of the rows, [B, N, D].
        adapter: the adapter, or None for none.
        coda: the routing, or None for the dense layer.
        layer_index: which of the encoder's layers this is; it picks the layer's reduction.

    Returns:
        [B, N, D].

    Reference: Lei et al. 2023, Conditional Adapters, section 3.
    """
    selection = None
    if coda is not None:
        reduction = coda.reductions(layer_index + 1)[layer_index]
        selection = Router(coda, reduction, name="router")(tokens)
    if selection is None:
        y = layer(tokens, tokens)
    else:
        selected = selection.gather(tokens)
        context = selected if coda.attention == "k_to_k" else tokens
        y = selection.scatter_add(tokens.x, layer(selected, context) - selected.x)
    if adapter is not None:
        y += Adapter(adapter, dtype=y.dtype, name="adapter")(tokens.u)
    return y
