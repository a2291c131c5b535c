"""Runs of the trainer and answers of two processes as one, and of one device; a program.

python tests/joined_runs.py CASE FOLDER one|joined
"""

import json
import pathlib
import sys

import divided_runs
from helpers import random_params
import jax
import numpy as np
import training_runs

from coda_jax import processes, trees
from coda_jax.sharding import Placement


def quick(placement, folder):
    """(parameters, metrics, whether a run that was cut off ends with the same bits, no answers)."""
    given = {"model": training_runs.Quick, "placement": placement}
    _, params, metrics = training_runs.run(folder / "uncut", **given)
    try:
        batches = training_runs.make_batches(3)
        training_runs.run(folder / "cut", batches=batches, **given)
    except ValueError as error:  # the data end
        assert "the data ended after 3" in str(error)
    _, again, found = training_runs.run(folder / "cut", **given)
    return params, metrics, divided_runs.same_bits(again, params) and found == metrics, []


def whole(case, placement, folder):
    """As `quick`, of a case of `divided_runs`, with its answers."""
    cfg = divided_runs.sized(case)
    params, metrics = divided_runs.run(cfg, placement, folder / "uncut")
    again, found = divided_runs.resumed(cfg, placement, folder / "cut")
    same = divided_runs.same_bits(again, params) and found == metrics
    assert divided_runs.largest(params, jax.tree.map(np.asarray, random_params(cfg))) > 1e-2
    return params, metrics, same, divided_runs.answers(cfg, params, placement)


def main(case, folder, how):
    """Writes parameters and all else into files of a folder; the first process does."""
    folder = pathlib.Path(folder) / how
    if how == "joined":
        mesh = {"data": 2, "model": 2} if case == "quick" else divided_runs.MESH
        placement = processes.placement(mesh, distributed=True)
    else:
        placement = Placement(devices=jax.devices()[:1])
    with processes.ending_together(str):
        if case == "memory":
            print(json.dumps(divided_runs.memory()))
            return
        found = quick(placement, folder) if case == "quick" else whole(case, placement, folder)
        params, metrics, same, answers = found
        if processes.is_first():
            np.savez(folder / "params.npz", **trees.flatten(params))
            report = {"metrics": metrics, "resumed": same, "answers": answers}
            (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
