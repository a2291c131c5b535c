"""`coda compare`: recipes side by side, on one checkpoint, data and budget.

Each recipe and seed is a run of `coda train`, one of `coda evaluate`, and one of `coda ood` where
that is asked for. What is finished is kept, so that the same command goes on where it was stopped.
"""

from collections.abc import Mapping, Sequence
import pathlib
import statistics
import time
from typing import Any

from coda_jax import checks, files
from coda_jax.commands import compare_routing
from coda_jax.commands.command_lines import CommandLine
from coda_jax.commands.compare_cells import CHECKPOINT, Cell
from coda_jax.commands.compare_plan import plan
from coda_jax.commands.compare_speed import Timed
from coda_jax.commands.loading import LoadedModel
from coda_jax.data.reports import say
from coda_jax.profiling import comparison_plots, timing
from coda_jax.profiling.comparison_page import page
from coda_jax.profiling.comparison_text import markdown
from coda_jax.training.metrics_file import read_metrics
from coda_jax.training.run_directory import checked

_BETTER = ("max", "min")
_LESS_IS_BETTER = ("loss", "wer", "cer", "mean_absolute_error", "mean_squared_error")
_INPUTS = 512  # of a held-out example that is shown, where nothing is timed


def compare(
    given: CommandLine,
    directory: str,
    recipes: Mapping[str, Any] | Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    detection: Mapping[str, Any] | None = None,
    metric: str | None = None,
    better: str | None = None,
    baselines: Mapping[str, float] | None = None,
    timed: Timed | None = None,
) -> dict[str, Any]:
    """Adapts one checkpoint by several recipes, and writes what came out.

    In the folder: report.json, report.md and report.html, quality_over_speed.png,
    learning_curves.png, routing.png where a recipe routes, and a folder for each recipe and seed.

    Args:
        given: flags of `coda train`, and of the other commands as far as they know them.
        directory: of all of it.
        recipes: {name: flags of `coda train`}, or names of files of methods/.
        seeds: of each recipe.
        training, evaluation, detection: flags of `coda train`, `evaluate` or, unless None, `ood`.
        metric: of the task that is shown; None for its first.
        better: whether more of it is better, "max", or less, "min"; None for what its name says.
        baselines: {name: the metric of another method}, to set beside.
        timed: what is timed; None for nothing.

    Returns:
        What report.json holds.

    Raises:
        ValueError: there is nothing to compare, a value is out of its range, or a cell of the
            folder is of another command; and what `coda train` and `coda evaluate` raise.
    """
    start, directory, timed = time.monotonic(), checked(directory), timed or Timed()
    better, levels = checks.Maybe(checks.OneOf(_BETTER))("BETTER", better), _baselines(baselines)
    cells = plan(directory, recipes, seeds, given, training or {}, evaluation or {}, detection)
    anew = not any(cell.is_finished for cell in cells)
    found = _found(cells, metric)
    metric = _metric((first := found[0][1])["metrics"], metric)
    report: dict[str, Any] = {
        "task": first["task"],
        "split": first["split"],
        "metric": metric,
        "better": better or ("min" if metric in _LESS_IS_BETTER else "max"),
        "steps": [*dict.fromkeys(score["steps"] for _, score in found)],
        "checkpoints": [*dict.fromkeys(cell.training.bindings[CHECKPOINT] for cell in cells)],
        "seeds": [*dict.fromkeys(cell.seed for cell in cells)],
        "timed": [[*sizes] for sizes in timed.batches],
        "dense": {},
        "baselines": levels,
    }
    report["recipes"] = _rows(directory, found, report["metric"])
    _measure(directory, report, [cell for cell in cells if cell.seed == cells[0].seed], timed)
    report["versions"] = timing.versions()
    report["seconds"] = time.monotonic() - start if anew else None
    _write(directory, report)
    return report


def _baselines(given: Any) -> dict[str, float]:
    """{name: its metric}."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise checks.wrong("BASELINES", "{name: a metric}", given)
    number = checks.Number()
    return {str(name): number(f"BASELINES[{name!r}]", x) for name, x in given.items()}


def _found(cells: Sequence[Cell], metric: str | None) -> list[tuple[Cell, Mapping[str, Any]]]:
    """Each cell with what is found of it; mistakes in recipes are told before any is trained."""
    checks.Maybe(checks.text)("METRIC", metric)
    for cell in cells:
        if cell.seed == cells[0].seed and not cell.is_finished:
            try:
                cell.rehearse()
            except ValueError as error:
                raise ValueError(f"{cell.recipe}: {error}") from error
    return [(cell, _found_of(cell, metric)) for cell in cells]


def _found_of(cell: Cell, metric: str | None) -> Mapping[str, Any]:
    """What is known of a cell that is finished, or what its run finds; it has the metric."""
    print(f"\n== {cell.recipe}, seed {cell.seed} ==", flush=True)
    if cell.is_finished:
        found = cell.kept()
        print(f"{cell.directory} is finished: {found['metrics']}", flush=True)
    else:
        found = cell.run()
    _metric(found["metrics"], metric)
    return found


def _metric(metrics: Mapping[str, float], name: str | None) -> str:
    """The metric that is shown."""
    return checks.OneOf([*metrics])("METRIC", next(iter(metrics)) if name is None else name)


def _rows(
    directory: pathlib.Path, found: Sequence[tuple[Cell, Mapping[str, Any]]], metric: str
) -> dict[str, dict[str, Any]]:
    """{recipe: its row}: the mean over seeds, its standard error, and the cells."""
    rows: dict[str, dict[str, Any]] = {}
    for cell, score in found:
        sizes = {name: score[name] for name in ("methods", "trained", "total", "stored")}
        row = rows.setdefault(cell.recipe, {**sizes, "cells": {}})
        row["cells"][str(cell.seed)] = {
            "score": score["metrics"][metric],
            "metrics": score["metrics"],
            "directory": cell.directory.relative_to(directory).as_posix(),
            **{name: score[name] for name in ("train", "evaluate", "seconds")},
            **{name: score[name] for name in ("ood", "detection") if name in score},
            "curve": read_metrics(cell.directory),
        }
    for row in rows.values():
        row |= _over_seeds([cell["score"] for cell in row["cells"].values()])
        if detection := [x["detection"] for x in row["cells"].values() if "detection" in x]:
            row["detection"] = _over_seeds(detection)
    return rows


def _over_seeds(found: Sequence[Any]) -> dict[str, Any]:
    """The "mean" of numbers and its standard "error", or {key: those} of equal nested records."""
    if isinstance(found[0], Mapping):
        return {key: _over_seeds([record[key] for record in found]) for key in found[0]}
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else None
    return {"mean": statistics.mean(found), "error": error}


def _measure(
    directory: pathlib.Path, report: dict[str, Any], cells: Sequence[Cell], timed: Timed
) -> None:
    """Adds what the models of some cells cost, and what a routed one reads."""
    models = {cell.recipe: cell.exported() for cell in cells}
    timed.add_answering(report, models)
    report["routed"] = _routed(directory, models, cells[0].kept(), timed)
    del models
    timed.add_training(report, {cell.recipe: cell.fresh() for cell in cells})


def _routed(
    directory: pathlib.Path,
    models: Mapping[str, LoadedModel],
    score: Mapping[str, Any],
    timed: Timed,
) -> list[dict[str, Any]]:
    """Some held-out inputs, drawn and as JSON, with what the first recipe that routes takes."""
    name = next((name for name, model in models.items() if compare_routing.routes(model)), None)
    if name is None:
        return []
    longest = timed.batches[0][1] if timed.batches else _INPUTS
    of_task = score["task"], score["split"], longest, timed.answer_length
    examples = compare_routing.examples(models[name], *of_task)
    title = f"What the encoder's layers work on: {name}"
    compare_routing.draw(directory / "routing.png", examples, title)
    return [{"recipe": name, **compare_routing.as_json(example)} for example in examples]


def _write(directory: pathlib.Path, report: Mapping[str, Any]) -> None:
    """The report as JSON, for people and as pictures."""
    files.write_json(directory / "report.json", report)
    files.write_text(directory / "report.md", text := markdown(report))
    files.write_text(directory / "report.html", page(report))
    comparison_plots.quality_over_speed(directory / "quality_over_speed.png", report)
    comparison_plots.learning_curves(directory / "learning_curves.png", report)
    print("\n" + text)
    say(f"see {directory}/report.html")
