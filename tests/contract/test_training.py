"""What is trained has the right gradient and changes; what is frozen keeps its bits."""

import functools

from contract.programs import batch_of, coda_of, fresh_params, params, without_gradient
from contract.table import each_case
from flax import traverse_util
from flax.serialization import from_state_dict, to_state_dict
from helpers import assert_same_tree, encode
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optimizer_definitions import Wrapper
import pytest

from coda_jax import methods, trees
from coda_jax.objectives import model_for
from coda_jax.training import steps
from coda_jax.training.partial_optimizer import PartialOptimizer

# Of the finite differences, as shares of a leaf's size: the later where the earlier change which
# tokens are picked.
STEPS = (0.0005, 0.0005, 0.0005, 0.0002, 0.0002)


def recorded():
    """Does nothing, and keeps the last gradient as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, state, params=None: (gradient, gradient),
    )


@functools.cache
def training(config):
    """(model, the trainer's step, the optimizer's first state, which begins with the gradient)."""
    model = model_for(config)
    optimizer = optax.chain(recorded(), steps.make_optimizer(model, optax.adam, 1e-2))
    step = steps.make_train_step(model, optimizer, accumulation=1, seed=0)
    start = optimizer.init(steps.partition(model, fresh_params(config))[0])
    return model, step, jax.device_get(start)  # numpy arrays: the step uses up JAX's


def after_steps(config, trained, frozen, number=1):
    """(the trainer's state, sums of the last step) after some steps on the same batch."""
    _, step, start = training(config)
    state = steps.TrainState(np.zeros((), np.int32), trained, start)
    for _ in range(number):
        state, sums = step(state, frozen, batch_of(config))
    return state, sums


@each_case("training")
def test_every_gradient_is_that_of_finite_differences(case):
    """Leaf by leaf, in a direction that is partly the gradient's and partly random."""
    config = case.config
    if coda_of(config) is not None and coda_of(config).routing == "straight_through":
        return  # its gradient is another weighting's: see tests/methods/test_coda.py
    trained, frozen = steps.partition(training(config)[0], params(config))
    state, sums = after_steps(config, trained, frozen)
    assert np.isfinite(sums.loss) and sums.weight > 0
    flat = trees.flatten(trained)
    for path, gradient in trees.flatten(jax.device_get(state.optimizer[0])).items():
        gradient = gradient * float(sums.weight)  # the trainer's is that of the mean
        assert np.isfinite(gradient).all(), path
        if trees.matches(path, without_gradient(config)):
            continue  # it may carry a score
        assert gradient.any(), path
        check_along_directions(config, flat, frozen, path, gradient)


def check_along_directions(config, flat, frozen, path, gradient):
    """Compares a leaf's gradient in a direction in which no layer picks other tokens.

    Some directions cross corners, a wrong gradient is right in none.
    """
    inputs = batch_of(config)["encoder_input_tokens"]
    rng = np.random.default_rng(0)

    def moved(direction):
        """The loss, and which tokens each layer picks."""
        trained = trees.unflatten({**flat, path: flat[path] + direction})
        _, sums = after_steps(config, trained, frozen)
        if coda_of(config) is None:
            return float(sums.loss), []
        _, selections = encode(config, trees.merge(trained, frozen), inputs)
        return float(sums.loss), [np.asarray(s.indices) for s in selections.values()]

    others = []
    for size in STEPS:
        noise = rng.normal(size=gradient.shape)
        direction = gradient / np.linalg.norm(gradient) + noise / np.linalg.norm(noise)
        direction *= size * np.linalg.norm(flat[path]) / np.linalg.norm(direction)
        direction = direction.astype(np.float32)
        (up, up_picks), (down, down_picks) = moved(direction), moved(-direction)
        if all(map(np.array_equal, up_picks, down_picks)):
            expected = np.sum(gradient * direction, dtype=np.float64)
            found = (up - down) / 2
            if abs(found - expected) < 0.01 * abs(expected) + 5e-6:
                return
            others.append((found, expected))  # perhaps across the corner of a relu
    pytest.fail(f"{path}: each direction changes what is picked, or the loss otherwise: {others}")


@each_case("training")
def test_training_changes_what_is_trained_and_nothing_else(case):
    """Invariant 5, in the trainer: the frozen leaves are an argument of its step."""
    config = case.config
    before = fresh_params(config)
    trained, frozen = steps.partition(training(config)[0], before)
    for found, expected in zip((trained, frozen), methods.partition(config, before), strict=True):
        assert_same_tree(found, expected)
    created = trees.split(before, methods.created(config))[0]
    assert trees.flatten(created).keys() <= trees.flatten(trained).keys()
    state, _ = after_steps(config, trained, frozen, number=2)
    after = trees.merge(jax.device_get(state.trained), frozen)
    assert_only_trained_leaves_changed(config, before, after)


@each_case("training")
def test_t5x_trains_the_same_leaves(case):
    """Invariant 5, as T5X does it: one tree of all leaves, of which the optimizer sees a part."""
    config = case.config
    optimizer = optax.adam(1e-2)
    for method in config.methods:
        optimizer = method.wrap_optimizer(optimizer)
    definition = PartialOptimizer(Wrapper(optimizer), methods.trained(config))

    @jax.jit
    def step(params, state):
        gradients = jax.tree.map(jnp.cos, params)  # of any model
        return definition.apply_gradient(None, params, state, gradients)

    before = fresh_params(config)
    after, state = before, definition.init_state(before)
    for _ in range(2):
        after, state = step(after, state)
    assert_only_trained_leaves_changed(config, before, jax.device_get(after))
    # T5X knows the leaves of the state by their paths.
    flat = traverse_util.flatten_dict(to_state_dict(state), keep_empty_nodes=True, sep="/")
    restored = from_state_dict(state, traverse_util.unflatten_dict(flat, sep="/"))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def assert_only_trained_leaves_changed(config, before, after):
    """Every trained leaf did, save those that no gradient reaches; the frozen keep their bits."""
    trained, _ = methods.partition(config, before)
    after = trees.flatten(after)
    for path, leaf in trees.flatten(before).items():
        if trees.matches(path, without_gradient(config)):
            continue
        assert after[path].dtype == leaf.dtype, path
        same = after[path].tobytes() == leaf.tobytes()
        assert same != (path in trees.flatten(trained)), path
