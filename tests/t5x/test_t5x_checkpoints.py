"""T5X checkpoints against T5X itself: it restores what we save, and we load what it saves."""

from flax.core import freeze
from flax.errors import ScopeParamShapeError
from helpers import assert_same_tree, shapes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5x_formats import CODA, fresh_params

from coda_jax import trees
from coda_jax.checkpoints import save_t5x
from coda_jax.checkpoints.t5x import read_t5x
from coda_jax.commands import t5x_run

t5x_checkpoints = pytest.importorskip(
    "t5x.checkpoints", reason="T5X is not installed", exc_type=ImportError
)


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


def restored(folder, wanted):
    """What T5X restores of a checkpoint, with our `restoration`, into a state of parameters."""
    from t5x import train_state

    state, partitioner = t5x_state(wanted)
    inference = train_state.InferenceState(
        state.step, params=state.params, params_axes=state.params_axes
    )
    manager = t5x_checkpoints.OrbaxCheckpointManagerInterface(str(folder), inference, partitioner)
    step = t5x_run.restoration(CODA, "checkpoint", "restored")
    found = manager.restore(path=str(folder / "checkpoint_5"), state_transformation_fns=[step])
    return found.params


def test_what_t5x_would_drop_is_found_as_it_restores(tmp_path, params):
    """In both formats, whose tables of leaves T5X shows in different ways."""
    save_t5x(tmp_path / "good", params, step=5)
    assert_same_tree(restored(tmp_path / "good", params), params)
    state, partitioner = t5x_state(params, step=5)
    t5x_checkpoints.Checkpointer(state, partitioner, str(tmp_path / "legacy")).save(state)
    assert_same_tree(restored(tmp_path / "legacy", params), params)
    extra = {**trees.flatten(params), "encoder/layers_2/adapter/wi/kernel": np.zeros((2, 2))}
    save_t5x(tmp_path / "extra", trees.unflatten(extra), step=5)
    with pytest.raises(ValueError, match="extra: encoder/layers_2/adapter/wi/kernel"):
        restored(tmp_path / "extra", params)


def test_other_shapes_which_t5x_takes_stop_the_first_step(tmp_path, params):
    flat, path = trees.flatten(params), "token_embedder/embedding"
    rows, width = flat[path].shape
    larger = {**flat, path: np.zeros((rows + 2, width), np.float32)}
    save_t5x(tmp_path, trees.unflatten(larger), step=5)
    found = restored(tmp_path, params)
    assert found["token_embedder"]["embedding"].shape == (rows + 2, width)
    with pytest.raises(ScopeParamShapeError, match="embedding"):
        CODA.network().apply({"params": found}, *CODA.init_inputs(), enable_dropout=False)
