"""Rematerialisation: a layer's values are computed again for its gradient, not kept until then."""

from flax import linen as nn
import jax

# T5X's names. "minimal" keeps the products with matrices, "full" the inputs of the layer alone.
POLICIES = {
    "none": None,
    "minimal": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialised(
    layer: type[nn.Module], policy: str, static_argnums: tuple[int, ...]
) -> type[nn.Module]:
    """The class of a layer whose gradient keeps what a policy says; leaves have the same paths.

    Args:
        layer: the class, with one `__call__`.
        policy: a name of `POLICIES`; the class itself for "none".
        static_argnums: arguments of the call that are no arrays, such as flags; `self` is 0.
    """
    if policy == "none":
        return layer
    return nn.remat(layer, policy=POLICIES[policy], static_argnums=static_argnums)
