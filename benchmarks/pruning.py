"""Quality at a density: structured pruning adapters beside fine-pruning, on the data of a demo.

    python -m benchmarks.pruning text --json=benchmarks/results/pruning.json

SPLoRA trains thin matrices beside a frozen base; fine-pruning trains the whole base. Both take away
the same groups by the same criterion and schedule: the first after a tenth of the steps, the last
after a half; the other half is recovery. The score is that of the answers to the test split. What
is in the JSON file is not computed again; `--table` prints the table of it.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.ablations import DEMOS, over_seeds
from coda_jax import files, methods, trees
from coda_jax.commands.loading import LoadedModel, load_model
from coda_jax.commands.train import train
from coda_jax.demos import comparison
from coda_jax.methods import Full, Method, StructuredPruning
from coda_jax.training.schedules import warmup_cosine
from coda_jax.training.trainer import TrainOptions

SPLORA, FINE = "SPLoRA", "fine-pruning"
RATES = {SPLORA: 1e-2, FINE: 1e-3}
CRITERIA = ("weight", "taylor")
DENSITIES = (1.0, 0.5, 0.3, 0.1)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A way to prune.

    Attributes:
        kind: `SPLORA` or `FINE`.
        density: of the prunable weights; 1 for no pruning.
        criterion: of the groups; of no effect at density 1.
    """

    kind: str
    density: float
    criterion: str

    @property
    def name(self) -> str:
        """In the table."""
        said = f", {self.criterion}" if self.density < 1 else ""
        return f"{self.kind}, {self.density:.0%}{said}"

    def methods(self, steps: int, rank: int) -> tuple[Method, ...]:
        """How the base is adapted in so many steps."""
        every = max(steps // 40, 1)
        pruning = StructuredPruning(
            rank=rank if self.kind == SPLORA else 0,
            criterion=self.criterion,
            density=self.density,
            start=steps // 10,
            steps=(steps // 2 - steps // 10) // every * every,
            every=every,
        )
        return (pruning,) if self.kind == SPLORA else (pruning, Full())


def cells() -> dict[str, Cell]:
    """All of them by name."""
    found = (Cell(*x) for x in itertools.product(RATES, DENSITIES, CRITERIA))
    return {cell.name: cell for cell in found}


def per_task(cell: Cell, model: LoadedModel) -> int:
    """Numbers that a task adds to a base that others share: what is not zero, or a whole model."""
    if cell.kind == FINE:
        return trees.count(methods.sliced(model.config, model.params)[1])
    trained, _ = methods.partition(model.config, model.params)
    return sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(trained))


def adapted(
    demo: comparison.Demo, cell: Cell, seed: int, folder: str, options: argparse.Namespace
) -> LoadedModel:
    """The model after its adaptation, with masks."""
    steps = options.steps or demo.steps
    rate = RATES[cell.kind] * options.rate
    result, _ = train(
        folder,
        load_model(str(demo.dense), methods=cell.methods(steps, options.rank), seed=seed),
        data=dataclasses.replace(demo.train_data, seed=seed),
        options=TrainOptions(steps, save_every=steps, seed=seed),
        optimizer=optax.adam,
        learning_rate=warmup_cosine(rate, steps, min(comparison.WARM_UP_STEPS, steps // 2)),
    )
    return result


def table(report: dict[str, Any]) -> str:
    """Means and standard errors over the seeds."""
    lines = [
        f"{report['task']}, {report['steps']} steps, {report['metric']} in per cent",
        "",
        "| | seeds | score | density | parameters of a task |",
        "|---|---|---|---|---|",
    ]
    for name, by_seed in sorted(report["cells"].items()):
        mean, error = over_seeds(by_seed, "score")
        density, _ = over_seeds(by_seed, "density")
        number, _ = over_seeds(by_seed, "parameters")
        score = f"{mean:.1f}" + (f" ± {error:.1f}" if len(by_seed) > 1 else "")
        lines.append(f"| {name} | {len(by_seed)} | {score} | {density:.1%} | {number:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("demo", choices=DEMOS)
    parser.add_argument("--cells", help="names, separated by ';'; all if it is not given")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rank", type=int, default=8, help="of SPLoRA; 8 by default")
    parser.add_argument("--steps", type=int, help="the demo's by default")
    parser.add_argument("--rate", type=float, default=1.0, help=f"multiplies the rates {RATES}")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--table", action="store_true", help="prints the table and stops")
    options = parser.parse_args()
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    if options.table:
        print("\n\n".join(map(table, results.values())))
        return
    known = cells()
    names = options.cells.split(";") if options.cells else [*known]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no cells {unknown}, only {[*known]}")
    demo = importlib.import_module(f"coda_jax.demos.{options.demo}").DEMO
    settings = {
        "task": demo.task,
        "metric": demo.metric,
        "steps": options.steps or demo.steps,
        "rank": options.rank,
        "rates": {kind: rate * options.rate for kind, rate in RATES.items()},
    }
    report = results.setdefault(options.demo, {**settings, "cells": {}})
    if different := {x: report[x] for x, value in settings.items() if report[x] != value}:
        parser.error(f"{options.json} has cells of {different}: name another file")
    for seed, name in itertools.product(options.seeds.split(","), names):
        if seed in report["cells"].get(name, {}):
            continue
        print(f"\n== {options.demo}: {name}, seed {seed} ==", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            model = adapted(demo, known[name], int(seed), folder, options)
            (pruning,) = model.config.methods
            found = {
                "score": comparison.score(demo, model),
                "density": pruning.progress(model.params)["density"],
                "parameters": per_task(known[name], model),
            }
        report["cells"].setdefault(name, {})[seed] = found
        print(f"{name}, seed {seed}: {found}", flush=True)
        files.write_json(options.json, results)
    print(table(report))


if __name__ == "__main__":
    main()
