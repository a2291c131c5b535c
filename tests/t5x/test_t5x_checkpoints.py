"""T5X checkpoints against T5X itself: it restores what we save, and we load what it saves."""

from flax.core import freeze
from helpers import assert_same_tree, shapes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5x_formats import CODA, fresh_params

from coda_jax.checkpoints import save_t5x
from coda_jax.checkpoints.t5x import read_t5x

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
