"""One step of training: what it changes, its gradient and its update, compiled.

Only the trained leaves have gradients and optimizer state; the frozen ones are an argument of the
step. The gradient is that of the mean loss over all target tokens of a batch, however many parts
and devices it is spread over.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from coda_jax import checks, methods, trees
from coda_jax.models import param_axes, placed
from coda_jax.nn.quantized import quantization_of
from coda_jax.objectives import Model, Sums
from coda_jax.sharding import Placement
from coda_jax.training import schedules
from coda_jax.training.distillation import Distillation

Batch = dict[str, np.ndarray]
NORM = checks.Number(above=0)


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
        step: number of steps taken.
        trained: the trained leaves, float32.
        optimizer: the optimizer's state over them.
    """

    step: jax.Array
    trained: dict[str, Any]
    optimizer: Any


def check_parts(batch: Batch, accumulation: int) -> None:
    """Raises ValueError where a batch has no so many equal parts."""
    rows = len(next(iter(batch.values())))
    if rows % accumulation:
        raise ValueError(
            f"a batch of {rows} rows cannot be worked through in accumulation={accumulation} equal "
            f"parts: it must be one of {[n for n in range(1, rows + 1) if rows % n == 0][:20]}"
        )


Step = Callable[..., tuple[TrainState, Sums]]  # see `make_train_step`


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    seed: int,
    shardings: TrainState | None = None,
    distillation: Distillation | None = None,
) -> Step:
    """The jitted step (state, frozen, batch) -> (state, sums); the state's buffers are reused.

    Args:
        model: what is trained.
        optimizer: of the trained leaves.
        accumulation: parts of a batch that are worked through one after the other.
        seed: of the random numbers.
        shardings: of the next state, which XLA chooses otherwise.
        distillation: the teacher that is followed, if any; its own leaves are then the step's
            fourth argument.
    """

    def loss(trained, frozen, batch, rng, teacher):
        params = trees.merge(trained, frozen)
        if distillation is None:
            return model.loss(params, batch, rng)
        return distillation.loss_of(model)(params, batch, rng, teacher)

    grad = jax.grad(loss, has_aux=True)

    def step(state: TrainState, frozen: Mapping, batch: Batch, teacher: Mapping | None = None):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        if not model.needs_rng:
            rng = None

        def part(total, inputs):
            index, microbatch = inputs
            part_rng = None if rng is None else jax.random.fold_in(rng, index)
            return jax.tree.map(
                jnp.add, total, grad(state.trained, frozen, microbatch, part_rng, teacher)
            ), None

        check_parts(batch, accumulation)
        if accumulation == 1:
            gradients, sums = grad(state.trained, frozen, batch, rng, teacher)
        else:
            # A part has rows from all over the batch, so that each device has its share of it.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
            )
            zeros = jax.tree.map(jnp.zeros_like, state.trained), Sums(*[jnp.zeros(())] * 5)
            (gradients, sums), _ = lax.scan(part, zeros, (jnp.arange(accumulation), parts))
        gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1), gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(state.step + 1, trained, optimizer_state), sums

    return jax.jit(step, donate_argnums=0, out_shardings=shardings and (shardings, shardings.step))


def partition(model: Model, params: Mapping[str, Any]) -> tuple[dict, dict]:
    """(trained, frozen): what the config's methods train, and the objective's own leaves.

    Raises:
        ValueError: the config has no methods, so that nothing would be trained; or what is to be
            trained is quantised.
    """
    if not model.config.methods:
        raise ValueError("nothing is trained: the config has no methods")
    trained, frozen = trees.split(params, (*methods.trained(model.config), *model.creates))
    if kind := quantization_of(trained):
        raise ValueError(f"leaves that are trained are {kind}: quantize with the model's methods")
    return trained, frozen


def make_optimizer(
    model: Model,
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    max_grad_norm: float | None = None,
) -> optax.GradientTransformation:
    """The optimizer with clipping, and each method's own part of a step around it."""
    learning_rate = schedules.rate_or_schedule("learning_rate", learning_rate)
    max_grad_norm = checks.Maybe(NORM)("max_grad_norm", max_grad_norm)
    transform = optimizer(learning_rate=learning_rate)
    if max_grad_norm is not None:
        transform = optax.chain(optax.clip_by_global_norm(max_grad_norm), transform)
    for method in model.config.methods:
        transform = method.wrap_optimizer(transform)
    return transform


def start(
    model: Model,
    params: Mapping,
    transform: optax.GradientTransformation,
    placement: Placement,
) -> tuple[TrainState, dict[str, Any], TrainState]:
    """The state before the first step, the frozen leaves, and the state's shardings.

    Args:
        model: what is trained.
        params: its parameters.
        transform: what `make_optimizer` gives.
        placement: the devices.
    """
    trained, frozen = partition(model, placed(model.config, params, placement))

    def begin(trained):
        trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
        state = TrainState(jnp.zeros((), jnp.int32), trained, transform.init(trained))
        return jax.tree.map(jnp.copy, state)  # no buffer twice, as a step reuses each

    shapes = placement.shapes(jax.eval_shape(begin, trained), param_axes(model.config))
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(begin, out_shardings=shardings)(trained), frozen, shardings


def steps_of(
    model: Model,
    routed: Callable[[int], tuple[methods.Method, ...]],
    make: Callable[[Model], Step],
) -> Callable[[int], Step]:
    """The step of each number, from 0; those with equal methods share one compiled program.

    Args:
        model: what is trained.
        routed: the methods of a step.
        make: compiles the step of a model.
    """

    @functools.cache
    def made(chosen):
        return make(model.with_methods(chosen))

    return lambda number: made(routed(number))
