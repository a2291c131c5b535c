"""T5X's optimizers for a part of the parameters: any of them, whose state is over what is trained.

The class has the methods of T5X's `OptimizerDef`, whose module is not imported here.
"""

from collections.abc import Mapping
from typing import Any

from flax import serialization
from flax.core import FrozenDict, freeze, unfreeze
import jax
import optax

from coda_jax import trees


class PartialOptimizer:
    """An optimizer definition of T5X that sees what is trained alone; the rest keeps its bits.

    Args:
        whole: any optimizer definition of T5X.
        patterns: of the paths of what is trained.
    """

    def __init__(self, whole: Any, patterns: tuple[str, ...]):
        self.whole = whole
        self._patterns = patterns

    def _trained(self, tree: Mapping) -> Mapping:
        return trees.split(tree, self._patterns)[0]

    @property
    def hyper_params(self) -> Any:
        """Those of the definition, which changes them in `set_param_axes`."""
        return self.whole.hyper_params

    def update_hyper_params(self, **changes: Any) -> Any:
        """The hyper-parameters with others, such as T5X's learning rate."""
        return self.whole.update_hyper_params(**changes)

    def init_state(self, params: Mapping) -> Any:
        """The first state."""
        return self.whole.init_state(self._trained(params))

    def create(self, target: Mapping) -> Any:
        """T5X's optimizer: this definition with the first state and the parameters."""
        made = self.whole.create(self._trained(target))
        return made.replace(optimizer_def=self, target=target)

    def apply_gradient(
        self, hyper_params: Any, params: Mapping, state: Any, grads: Mapping
    ) -> tuple[Mapping, Any]:
        """A step: (the parameters, the state). Frozen leaves are the very ones that are given."""
        trained, frozen = trees.split(params, self._patterns)
        trained, state = self.whole.apply_gradient(
            hyper_params, trained, state, self._trained(grads)
        )
        params_after = trees.merge(trained, frozen)
        return freeze(params_after) if isinstance(params, FrozenDict) else params_after, state

    def state_dict(self, target: Mapping, state: Any) -> dict[str, Any]:
        """What a checkpoint holds: all parameters, and the state of those that are trained."""
        return self.whole.state_dict(target, state)

    def restore_state(self, target: Mapping, state: Any, state_dict: Mapping) -> tuple[Any, Any]:
        """The inverse of `state_dict`."""
        return self.whole.restore_state(target, state, state_dict)

    def set_param_axes(self, axes: Mapping) -> None:
        """Tells the definition the names of the axes, if it asks for them."""
        if hasattr(self.whole, "set_param_axes"):
            self.whole.set_param_axes(self._trained(axes))

    def derive_logical_axes(self, optimizer: Any, axes: Mapping) -> Any:
        """The optimizer with names of axes in the place of arrays, None for those that are whole.

        What the state holds under a parameter's path, in its shape, is divided as the parameter is:
        so no kind of state needs a rule of its own.
        """
        names, leaves = trees.flatten(axes), trees.flatten(optimizer.target)

        def axes_of(path, leaf):
            inside = f"/{jax.tree_util.keystr(path, simple=True, separator='/')}/"
            owner = max((name for name in names if f"/{name}/" in inside), key=len, default=None)
            return names[owner] if owner and leaves[owner].shape == leaf.shape else None

        states = jax.tree_util.tree_map_with_path(axes_of, optimizer.state.param_states)
        state = optimizer.state.replace(step=None, param_states=states)
        target = serialization.from_state_dict(optimizer.target, unfreeze(axes))
        return optimizer.replace(target=target, state=state)


def steps_taken(param_states: Any) -> Any | None:
    """The steps that optax has counted in its state; None where T5X's optimizers count none."""
    counts = [count for _, count in optax.tree_utils.tree_get_all_with_path(param_states, "count")]
    return counts[0] if counts else None
