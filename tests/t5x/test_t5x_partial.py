"""What T5X cannot restore as it is stored, with T5X: stacked layers, what a run left out."""

import contextlib
import dataclasses
import functools
import importlib

from flax.core import freeze
from helpers import (
    ADAPTER,
    assert_same_tree,
    config,
    logits,
    random_params,
    random_tokens,
    shapes,
    shift_right,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.checkpoints import save_t5x
from coda_jax.checkpoints.t5x import is_of_scalable_t5, read_t5x
from coda_jax.checkpoints.t5x_record import run_folder, write_record
from coda_jax.checkpoints.t5x_scanned import to_scanned
from coda_jax.commands import t5x_partial, t5x_run
from coda_jax.methods import Coda, partition

t5x_checkpoints = pytest.importorskip(
    "t5x.checkpoints", reason="T5X is not installed", exc_type=ImportError
)
DENSE = config(relpos_num_buckets=32, relpos_max_distance=128, dropout_rate=0.0)
ADAPTED = DENSE.replace(methods=(Coda(3), ADAPTER))
FORMATS = ["legacy", "orbax"]


def t5x_state(variables, step=0):
    """T5X's train state of a network's variables, on one device, and its partitioner."""
    adafactor, partitioning, train_state = (
        importlib.import_module(f"t5x.{name}")
        for name in ("adafactor", "partitioning", "train_state")
    )
    optimizer = adafactor.Adafactor(logical_factor_rules=adafactor.standard_logical_factor_rules())
    state = train_state.FlaxOptimTrainState.create(optimizer, freeze(variables))
    state = state.replace_step(jnp.asarray(step, jnp.int32))
    return state, partitioning.PjitPartitioner(num_partitions=1)


def save(folder, variables, kind, steps=()):
    """Saves a state of step 5 as T5X does, in one of its formats."""
    state, partitioner = t5x_state(variables, 5)
    if kind == "legacy":
        t5x_checkpoints.Checkpointer(state, partitioner, str(folder)).save(state, steps)
        return
    folder.mkdir(parents=True, exist_ok=True)
    manager = t5x_checkpoints.OrbaxCheckpointManagerInterface(str(folder), state, partitioner)
    with contextlib.closing(manager):
        manager.save(state, steps)


def restored(folder, cfg, base=None):
    """The state that T5X restores of a checkpoint for an evaluation, with our steps."""
    train_state = importlib.import_module("t5x.train_state")
    made = shapes(cfg)
    variables = {
        **made,
        "params": jax.tree.map(lambda x: np.ones(x.shape, x.dtype), made["params"]),
    }
    state, partitioner = t5x_state(variables)
    wanted = train_state.InferenceState(state.step, state.params, state.params_axes)
    manager = t5x_checkpoints.OrbaxCheckpointManagerInterface(str(folder), wanted, partitioner)
    path = str(folder / "checkpoint_5")
    steps = [t5x_partial.whole(cfg, path, base), t5x_run.restoration(cfg, path)]
    return manager.restore(path=path, state_transformation_fns=steps)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_a_run_left_out_t5x_gets_from_its_base(tmp_path, kind):
    """Of a base in bfloat16, whose leaves T5X trains as float32."""
    trained, frozen = partition(ADAPTED, random_params(ADAPTED))
    stored = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), frozen)
    norms, _ = partition(ADAPTED, random_params(DENSE, seed=1))
    base = str(save_t5x(tmp_path / "base", trees.merge(stored, norms)))
    params = trees.merge(trained, jax.tree.map(lambda leaf: leaf.astype(np.float32), stored))
    folder = tmp_path / "run"
    run = ADAPTED, base, str(folder), True
    write_record(run_folder(folder), ADAPTED, t5x_partial.noted_base(*run))
    variables = {"params": params, "params_axes": shapes(ADAPTED)["params_axes"]}
    save(folder, variables, kind, [t5x_partial.saved(*run)])
    assert_same_tree(read_t5x(folder)[0], trained)
    found = restored(folder, ADAPTED, base)
    assert found.step == 5
    assert_same_tree(found.params, params)
    with pytest.raises(ValueError, match="give the base that it belongs to"):
        restored(folder, ADAPTED)


def scalable_network(cfg, **options):
    """T5X's scalable T5 of a config's sizes."""
    network = importlib.import_module("t5x.examples.scalable_t5.network")
    names = [field.name for field in dataclasses.fields(network.T5Config)]
    sizes = {name: getattr(cfg, name) for name in names if hasattr(cfg, name)}
    return network.Transformer(network.T5Config(**sizes, **options))


def compare_logits(network, params, cfg, ours, rng):
    inputs, targets = random_tokens(rng, (9, 5), 9), random_tokens(rng, (4, 3), 4)
    given = inputs, shift_right(targets), targets
    theirs = network.apply({"params": params}, *given, enable_dropout=False)
    expected = np.asarray(theirs)[targets > 0]
    np.testing.assert_allclose(logits(cfg, ours, *given)[targets > 0], expected, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_stacked_has_our_logits_in_t5xs_network(tmp_path, rng, shared):
    """T5X's own checkpointer restores it into the state of its scalable T5."""
    cfg = DENSE.replace(shared_relpos_bias=shared)
    params, network = random_params(cfg), scalable_network(cfg)
    save_t5x(tmp_path, to_scanned(cfg, params), step=5)
    variables = network.init(jax.random.key(0), *cfg.init_inputs(), enable_dropout=False)
    state, partitioner = t5x_state(variables)
    train_state = importlib.import_module("t5x.train_state")
    wanted = train_state.InferenceState(state.step, state.params, state.params_axes)
    manager = t5x_checkpoints.OrbaxCheckpointManagerInterface(str(tmp_path), wanted, partitioner)
    found = manager.restore(path=str(tmp_path / "checkpoint_5"))
    trees.check_tree(variables["params"], found.params)
    compare_logits(network, found.params, cfg, params, rng)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_starts_from_what_the_scalable_t5_was_saved_as(tmp_path, kind, scan_layers, rng):
    """T5X's network and checkpointer; its own biases differ from layer to layer."""
    cfg = DENSE.replace(shared_relpos_bias=False)
    network = scalable_network(cfg, scan_layers=scan_layers)
    init = functools.partial(network.init, enable_dropout=False)
    variables = init(jax.random.key(0), *cfg.init_inputs())
    save(tmp_path, variables, kind)
    assert is_of_scalable_t5(tmp_path)
    found = restored(tmp_path, cfg)
    assert found.step == 5
    assert_same_tree(found.params, read_t5x(tmp_path)[0])
    compare_logits(network, variables["params"], cfg, found.params, rng)
