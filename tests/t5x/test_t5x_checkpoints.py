"""T5X checkpoints against T5X itself: it restores what we save, and we load what it saves."""

import importlib

from flax.core import freeze
from helpers import assert_same_tree, shapes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5x_formats import CODA, fresh_params

from coda_jax import trees
from coda_jax.checkpoints import save_t5x
from coda_jax.checkpoints.t5x import read_t5x

t5x_checkpoints = pytest.importorskip(
    "t5x.checkpoints", reason="T5X is not installed", exc_type=ImportError
)


t5x_models = importlib.import_module("coda_jax.t5x_models")


@pytest.fixture(name="params", scope="module")
def fixture_params():
    return fresh_params()


def t5x_partitioner():
    """T5X's partitioner with every parameter cut in two."""
    from t5x import partitioning

    return partitioning.PjitPartitioner(num_partitions=None, model_parallel_submesh=(1, 1, 1, 2))


def t5x_state(params, step=0):
    """T5X's train state of a network with these parameters, distributed over the devices."""
    from t5x import adafactor, train_state

    optimizer = adafactor.Adafactor(logical_factor_rules=adafactor.standard_logical_factor_rules())
    state = train_state.FlaxOptimTrainState.create(
        optimizer, freeze({"params": params, "params_axes": shapes(CODA)["params_axes"]})
    )
    state = state.replace_step(jnp.asarray(step, jnp.int32))
    partitioner = t5x_partitioner()
    axes = partitioner.get_mesh_axes(state)
    place = jax.jit(lambda x: x, out_shardings=jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(partitioner.mesh, spec or jax.P()), axes.params,
        is_leaf=lambda spec: spec is None or isinstance(spec, jax.P)))  # fmt: skip
    return state.replace_params(place(state.params)), partitioner


@pytest.mark.parametrize("kind", ["legacy", "orbax"])
def test_loads_what_t5x_saves(tmp_path, params, kind):
    state, partitioner = t5x_state(params, step=5)
    if kind == "legacy":
        t5x_checkpoints.Checkpointer(state, partitioner, str(tmp_path)).save(state)
        folder = tmp_path / "checkpoint_5" / "target.token_embedder.embedding"
        assert len(list(folder.iterdir())) == 3  # the metadata and a chunk for each device
    else:
        manager = t5x_checkpoints.OrbaxCheckpointManagerInterface(str(tmp_path), state, partitioner)
        manager.save(state)
        manager.close()
    loaded, step = read_t5x(tmp_path)
    assert step == 5
    assert_same_tree(loaded, params)


def test_t5x_restores_what_is_saved(tmp_path, params):
    from t5x import train_state

    path = save_t5x(tmp_path, params, step=5)
    state, partitioner = t5x_state(jax.tree.map(np.zeros_like, params))
    inference = train_state.InferenceState(
        state.step, params=state.params, params_axes=state.params_axes
    )
    manager = t5x_checkpoints.OrbaxCheckpointManagerInterface(str(tmp_path), inference, partitioner)
    restored = manager.restore(path=str(path))
    assert restored.step == 5
    assert_same_tree(restored.params, params)


def restored(cls, folder, wanted):
    """What a manager of T5X restores of a checkpoint into a state of these parameters."""
    from t5x import train_state

    state, partitioner = t5x_state(wanted)
    inference = train_state.InferenceState(
        state.step, params=state.params, params_axes=state.params_axes
    )
    manager = cls(str(folder), inference, partitioner)
    step = t5x_models.restoration(CODA, "restored")
    found = manager.restore(path=str(folder / "checkpoint_5"), state_transformation_fns=[step])
    return found.params


def test_what_is_restored_is_compared_with_the_model_also_where_nobody_looked(tmp_path, params):
    """T5X and orbax take arrays of other shapes, and drop those that they do not know."""
    save_t5x(tmp_path / "good", params, step=5)
    ours, theirs = t5x_models.CheckpointManager, t5x_checkpoints.OrbaxCheckpointManagerInterface
    assert_same_tree(restored(ours, tmp_path / "good", params), params)
    path = "token_embedder/embedding"
    flat = trees.flatten(params)
    larger = {**flat, path: np.zeros((flat[path].shape[0] + 2, flat[path].shape[1]), np.float32)}
    save_t5x(tmp_path / "larger", trees.unflatten(larger), step=5)
    assert restored(theirs, tmp_path / "larger", params)["token_embedder"]["embedding"].shape == (
        larger[path].shape
    )
    with pytest.raises(ValueError, match=rf"\(1 leaves\):\n  wrong shape: {path} is "):
        restored(ours, tmp_path / "larger", params)
    extra = {**flat, "encoder/layers_2/adapter/wi/kernel": np.zeros((2, 2), np.float32)}
    save_t5x(tmp_path / "extra", trees.unflatten(extra), step=5)
    with pytest.raises(ValueError, match="extra: encoder/layers_2/adapter/wi/kernel"):
        restored(theirs, tmp_path / "extra", params)
