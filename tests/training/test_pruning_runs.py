"""Runs that prune: one that is cut off between two prunings ends with the same bits."""

import dataclasses

from contract.programs import fresh_params
from helpers import TINY
import jax
import numpy as np
import optax
import pytest
from training_runs import make_batches

from coda_jax import trees
from coda_jax.methods import Full, StructuredPruning
from coda_jax.objectives import Seq2Seq
from coda_jax.training import trainer

# Groups go after steps 2 and 4; a checkpoint of step 3 has scores of one step for step 4.
WHEN = {"density": 0.5, "start": 2, "steps": 2, "every": 2}
OPTIONS = trainer.TrainOptions(total_steps=6, save_every=3, log_every=2)
RUNS = {
    "global": (StructuredPruning(rank=2, **WHEN),),
    "uniform": (StructuredPruning(rank=2, scope="uniform", **WHEN),),
    "blocks": (StructuredPruning("splopa", rank=1, block=4, prototypes=2, **WHEN),),
    "fine-pruning": (StructuredPruning(rank=0, **WHEN), Full()),
}


def run(directory, methods, batches=None):
    """(leaves before, leaves after) of a run."""
    config = TINY.replace(num_encoder_layers=1, dropout_rate=0.1, methods=methods)
    before = fresh_params(config)
    after, _ = trainer.train(
        Seq2Seq(config),
        before,
        batches or make_batches(),
        options=OPTIONS,
        optimizer=optax.adam,
        learning_rate=1e-2,
        directory=directory,
        run={"name": "test"},
    )
    return trees.flatten(before), trees.flatten(after)


def test_a_run_that_ends_before_the_last_pruning_is_refused(tmp_path):
    late = StructuredPruning(rank=2, density=0.5, start=2, steps=5, every=2)
    run(tmp_path / "at the last", (late,))  # after step 6
    late = dataclasses.replace(late, steps=6)
    said = (
        r"'structured_pruning' changes the model until step 8, and the training ends after step 6"
    )
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "late", (late,))
    run(tmp_path / "all stays", (dataclasses.replace(late, density=1.0),))


@pytest.mark.all
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_cut_off_prunes_as_an_uncut_one(name, tmp_path):
    before, expected = run(tmp_path / "uncut", RUNS[name])
    with pytest.raises(ValueError, match="the data ended after 4 of 6"):
        run(tmp_path / "cut", RUNS[name], make_batches(4))
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["3"]
    _, found = run(tmp_path / "cut", RUNS[name])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    density = RUNS[name][0].progress(trees.unflatten(expected))["density"]
    assert 0.5 <= density < 0.65
    changed = [path for path, leaf in expected.items() if not np.array_equal(leaf, before[path])]
    trained = "/kernel" if name == "fine-pruning" else "/pruning_"
    assert any(trained in path for path in changed)
    assert name == "fine-pruning" or all("/pruning_" in path for path in changed)
