"""What the record of a method promises to a method that nothing in the package knows."""

import dataclasses
from typing import ClassVar

from contract.programs import batch_of, fresh_params, outputs, params
from contract.table import one_family_by_default
from flax import linen as nn
from flax.linen import partitioning
from helpers import assert_same_tree, shapes
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optimizer_definitions import Wrapper
import pytest

from coda_jax import methods, trees
from coda_jax.checkpoints import load_adapter, save_adapter
from coda_jax.methods import METHODS, Coda, Method, ParallelAdapter
from coda_jax.models import FAMILIES
from coda_jax.objectives import model_for
from coda_jax.training import steps
from coda_jax.training.partial_optimizer import PartialOptimizer


@dataclasses.dataclass(frozen=True)
class Pruning(Method):
    """Each step takes away one more channel of each layer's output.

    Attributes:
        start: the first channel.
    """

    name: ClassVar[str] = "pruning"
    creates: ClassVar[tuple[str, ...]] = (r"(^|/)pruned/",)
    without_gradient: ClassVar[tuple[str, ...]] = (r"(^|/)pruned/mask$",)

    start: int = 0

    def wrap_layer(self, layer, place):
        """The layer's output in the channels that are left."""
        return lambda tokens, context: Mask(name="pruned")(layer(tokens, context))

    def wrap_optimizer(self, optimizer):
        """Counts the steps, and changes the masks by their updates."""

        def init(params):
            return jnp.asarray(self.start, jnp.int32), optimizer.init(params)

        def update(updates, state, params=None):
            channel, inner = state
            updates, inner = optimizer.update(updates, inner, params)

            def taken(path, update, leaf):
                if "'mask'" not in jax.tree_util.keystr(path):
                    return update
                return -leaf * (jnp.arange(leaf.shape[0]) == channel)

            updates = jax.tree_util.tree_map_with_path(taken, updates, params)
            return updates, (channel + 1, inner)

        return optax.GradientTransformation(init, update)


class Mask(nn.Module):
    """y * mask, and no gradient of the mask."""

    @nn.compact
    def __call__(self, y):
        """[B, n, D] -> [B, n, D]."""
        mask = partitioning.param_with_axes(
            "mask", nn.initializers.ones, (y.shape[-1],), jnp.float32, axes=("embed",)
        )
        return y * jax.lax.stop_gradient(mask)


@dataclasses.dataclass(frozen=True)
class Gain(Method):
    """Scales what projections give; the gain is learned as its logarithm, which is then dropped.

    Attributes:
        finished: whether the leaves are the gains themselves.
    """

    name: ClassVar[str] = "gain"
    creates: ClassVar[tuple[str, ...]] = (r"/(log_)?gain$",)

    finished: bool = False

    def wrap_module(self, call, module):
        """What the module gives, times the gain."""
        if module.name != "query":
            return call
        name, init = "log_gain", nn.initializers.zeros
        if self.finished:
            name, init = "gain", nn.initializers.ones

        def scaled(x):
            y = call(x)
            gain = partitioning.param_with_axes(
                name, init, y.shape[-1:], jnp.float32, axes=("joined_kv",)
            )
            return y * (gain if self.finished else jnp.exp(gain))

        return scaled

    def finish(self, config, params):
        """The gains in the place of their logarithms."""
        flat = {
            path.replace("/log_gain", "/gain"): np.exp(leaf) if path.endswith("/log_gain") else leaf
            for path, leaf in trees.flatten(params).items()
        }
        return Gain(finished=True), trees.unflatten(flat)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for method in (Pruning, Gain):
        monkeypatch.setitem(METHODS, method.name, method)


def tiny(family, *adaptation):
    """The family's tiny model, with one encoder layer."""
    return FAMILIES[family].tiny.replace(methods=adaptation, num_encoder_layers=1, dropout_rate=0.0)


def masks_of(tree):
    """The masks of all layers."""
    flat = trees.flatten(tree)
    return {path: np.asarray(leaf) for path, leaf in flat.items() if path.endswith("pruned/mask")}


def assert_taken(masks, number):
    """So many channels are taken away, the first ones, in every layer."""
    assert masks
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, np.arange(len(mask)) >= number, err_msg=path)


@one_family_by_default(0)
def test_a_method_changes_its_own_leaves_in_the_trainers_step(family):
    """The state of `wrap_optimizer` counts, and the masks follow; what is learned is learned."""
    config = tiny(family, Pruning(), ParallelAdapter(4))
    model = model_for(config)
    optimizer = steps.make_optimizer(model, optax.adam, 1e-2, max_grad_norm=1.0)
    step = steps.make_train_step(model, optimizer, accumulation=1, seed=0)
    before = fresh_params(config)
    trained, frozen = steps.partition(model, before)
    assert masks_of(trained).keys() == masks_of(before).keys()
    state = steps.TrainState(np.zeros((), np.int32), trained, optimizer.init(trained))
    for number in (1, 2, 3):
        state, sums = step(state, frozen, batch_of(config))
        assert np.isfinite(sums.loss)
        assert_taken(masks_of(state.trained), number)
    after = trees.flatten(jax.device_get(state.trained))
    learned = [path for path in after if not path.endswith("pruned/mask")]
    assert learned
    for path in learned:
        assert not np.array_equal(after[path], trees.flatten(trained)[path]), path


@one_family_by_default(1)
def test_a_method_changes_its_own_leaves_in_t5x(family):
    """Through a definition of an optimizer over all leaves, as T5X calls it."""
    config = tiny(family, Pruning(start=1), Coda())
    optimizer = optax.adam(1e-2)
    for method in config.methods:
        optimizer = method.wrap_optimizer(optimizer)
    definition = PartialOptimizer(Wrapper(optimizer), methods.trained(config))

    @jax.jit
    def step(params, state):
        return definition.apply_gradient(None, params, state, jax.tree.map(jnp.cos, params))

    before = fresh_params(config)
    after, state = before, definition.init_state(before)
    for _ in range(2):
        after, state = step(after, state)
    for path, mask in masks_of(after).items():
        np.testing.assert_array_equal(np.flatnonzero(mask == 0), [1, 2], err_msg=path)
    _, frozen = methods.partition(config, before)
    assert_same_tree(methods.partition(config, jax.device_get(after))[1], frozen)


@one_family_by_default(2)
def test_a_method_around_modules_has_its_leaves_beside_theirs(family):
    """They have axis names, and what `finish` makes of them gives the same outputs."""
    config = tiny(family, Gain(), Coda())
    leaves = trees.flatten(params(config))
    gains = [path for path in leaves if path.endswith("/log_gain")]
    assert gains and all(path.replace("log_gain", "kernel") in leaves for path in gains)
    axes = trees.flatten(shapes(config)["params_axes"])
    assert {axes[f"{path}_axes"].names for path in gains} == {("joined_kv",)}
    finished, after = methods.finish(config, params(config))
    assert finished.methods == (Gain(finished=True), Coda()) or finished.methods == (
        Coda(),
        Gain(finished=True),
    )
    assert len(trees.flatten(after)) == len(leaves)
    np.testing.assert_allclose(
        outputs(finished, after, batch_of(config)),
        outputs(config, params(config), batch_of(config)),
        atol=1e-5,
    )


@one_family_by_default(0)
def test_a_methods_own_leaves_are_in_the_adapter_file(family, tmp_path):
    """What it trained and what it changed itself."""
    config = tiny(family, Pruning(start=2), Gain())
    save_adapter(tmp_path, config, params(config))
    _, base = trees.split(params(config), methods.created(config))
    loaded, found = load_adapter(tmp_path, config.dense(), base)
    assert loaded == config
    assert_same_tree(found, params(config))
