"""Checkpoints, runs of the trainer and answers of two processes as one; a program.

python tests/joined_runs.py state|memory|CASE FOLDER joined|one
"""

import json
import pathlib
import sys

import divided_runs
from helpers import random_params
import jax
import numpy as np

from coda_jax import processes, trees
from coda_jax.sharding import Placement
from coda_jax.training.run_checkpoints import RunCheckpoints
from coda_jax.training.steps import TrainState


def state(placement, folder):
    """What is divided is gathered, saved and read again; what differs is refused."""
    numbers = np.arange(8, dtype=np.float32).reshape(2, 4)
    tree = {"wi": {"kernel": numbers}, "scale": np.ones(3, np.float32)}
    trained = placement.params(tree, {"wi/kernel": ("embed", "mlp")})
    assert trained["wi"]["kernel"].addressable_shards[0].data.shape == (2, 2)
    saved = TrainState(placement.params(np.int32(3), {}), trained, ())
    np.testing.assert_array_equal(processes.fetch(saved).trained["wi"]["kernel"], numbers)
    rows = placement.batch({"tokens": numbers})["tokens"]
    np.testing.assert_array_equal(processes.fetch(rows), numbers)
    with RunCheckpoints(folder, {"name": "test"}, keep=1) as checkpoints:
        checkpoints.save(saved, {"loss": 1.0}, {"since": 2})
        empty = jax.tree.map(jax.numpy.zeros_like, saved)
        found, metrics, carried = checkpoints.best(empty)
        assert carried == {"since": 2}
        assert divided_runs.same_bits(processes.fetch(found), processes.fetch(saved))
        assert metrics == {"loss": 1.0}
        assert found.trained["wi"]["kernel"].sharding == saved.trained["wi"]["kernel"].sharding
    number = jax.process_index()
    assert processes.from_first(lambda: {"number": number}) == {"number": 0}
    processes.check_same("the numbers", lambda: [numbers])
    try:
        processes.check_same("the numbers", lambda: [numbers + number])
    except ValueError as error:
        assert number == 1 and "the numbers of process 1 are not those of process 0" in str(error)
    else:
        assert number == 0


def whole(case, placement, folder):
    """(parameters, metrics, whether a run that was cut off ends with the same bits, answers)."""
    cfg = divided_runs.sized(case)
    params, metrics = divided_runs.run(cfg, placement, folder / "uncut")
    again, found = divided_runs.resumed(cfg, placement, folder / "cut")
    same = divided_runs.same_bits(again, params) and found == metrics
    assert divided_runs.largest(params, jax.tree.map(np.asarray, random_params(cfg))) > 1e-2
    return params, metrics, same, divided_runs.answers(cfg, params, placement)


def main(case, folder, how):
    """Writes parameters and all else of a run into files of a folder; the first process does."""
    folder = pathlib.Path(folder) / how
    with processes.ending_together(str, lambda _: 1):
        if case == "state":
            state(processes.placement({"model": 2}, distributed=True), folder)
            return
        if how == "joined":
            placement = processes.placement(divided_runs.MESH, distributed=True)
        else:
            placement = Placement(devices=jax.devices()[:1])
        if case == "memory":
            print(json.dumps(divided_runs.memory()))
            return
        params, metrics, same, answers = whole(case, placement, folder)
        if processes.is_first():
            np.savez(folder / "params.npz", **trees.flatten(params))
            report = {"metrics": metrics, "resumed": same, "answers": answers}
            (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
