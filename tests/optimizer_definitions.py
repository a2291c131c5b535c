"""A definition of an optimizer like T5X's own of one of optax, without T5X."""

from typing import Any

from flax import struct
import optax


@struct.dataclass
class State:
    """As T5X's."""

    step: Any
    param_states: Any


@struct.dataclass
class Optimizer:
    """As T5X's."""

    optimizer_def: Any = struct.field(pytree_node=False)
    state: State
    target: Any


class Wrapper:
    """As T5X's."""

    def __init__(self, optimizer: optax.GradientTransformation):
        self._optimizer = optimizer

    def init_state(self, params):
        """The first state."""
        return State(0, self._optimizer.init(params))

    def create(self, target):
        """The optimizer of parameters."""
        return Optimizer(self, self.init_state(target), target)

    def apply_gradient(self, hyper_params, params, state, grads):
        """A step: (the parameters, the state)."""
        updates, states = self._optimizer.update(grads, state.param_states, params)
        return optax.apply_updates(params, updates), State(state.step + 1, states)
