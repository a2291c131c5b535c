"""The table of a comparison: what its columns are, and how each number is written.

A report, which is report.json of `coda compare`, may lack any number: it is None here, and a dash
where people read it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any

DENSE = "dense model"  # the model without any method, the reference of the speed-ups
MISSING = "–"  # noqa: RUF001 (a dash)
_METRIC_NAMES = {"wer": "word error rate", "cer": "character error rate"}
_DETECTION = {
    "auroc": "AUROC (higher is better)",
    "fpr_at_95_tpr": "FPR at 95 % TPR (lower is better)",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number, and how it is written.

    Attributes:
        value: as in the report; None: it has none.
        text: for people.
    """

    value: float | None
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of numbers.

    Attributes:
        title: what all rows have in common.
        headings: of the columns, without that of the names.
        rows: (name, one cell for each heading) of each.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def number(record: Any, *path: Any) -> float | None:
    """The finite number at a path of keys and indices, None where there is none."""
    found = _at(record, path)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return found if math.isfinite(found) else None


def metric_name(report: Mapping[str, Any]) -> str:
    """What the metric is called."""
    metric = report.get("metric", "quality")
    return _METRIC_NAMES.get(metric, metric)


def direction(report: Mapping[str, Any]) -> str:
    """Which values of the metric are good ones."""
    return "lower is better" if report.get("better") == "min" else "higher is better"


def timed(report: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(batch, input length) of each timing, the most telling one first."""
    return [(batch, length) for batch, length in report.get("timed") or ()]


def speed_key(batch: int, length: int) -> str:
    """Where a record's `speed` has a timing."""
    return f"{batch}x{length}"


def quality(record: Mapping[str, Any]) -> Cell:
    """The mean of a recipe, with its standard error."""
    return _with_error("{:.1f}", 1, record)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Everything at the first timing, the speed alone at each other one, then detection.

    Recipes are followed by methods of others and by the dense model; a column in which no row has
    a number is left out.
    """
    recipes = dict(report.get("recipes") or {})
    others = {name: {"mean": mean} for name, mean in (report.get("baselines") or {}).items()}
    records = [*recipes.items(), *others.items()]
    if report.get("dense"):
        records.append((DENSE, report["dense"]))
    first, *rest = timed(report) or [None]
    columns = [(f"{metric_name(report)}, %", quality), *_PARAMETERS]
    title = "Quality and parameters"
    if first:
        title = f"Quality and parameters; speed at {_place(first)}"
        columns += _speed_columns(records, speed_key(*first))
    columns += _tpu_columns(records)
    found = [_table(title, columns, records)]
    for place in rest:
        of_speed = [(name, record) for name, record in records if record.get("speed")]
        columns = _speed_columns(records, speed_key(*place))
        found.append(_table(f"Speed at {_place(place)}", columns, of_speed))
    return found + _detection_tables(records)


def facts(report: Mapping[str, Any]) -> list[str]:
    """What the numbers are and how they were made, in sentences."""
    seeds, versions = report.get("seeds") or [], dict(report.get("versions") or {})
    what = f"{metric_name(report).capitalize()} ({direction(report)})"
    what += f" on {report['task']}" if "task" in report else ""
    what += f", split '{report['split']}'" if "split" in report else ""
    if steps := report.get("steps"):
        what += f", {' or '.join(f'{x:,}' for x in steps)} steps of adaptation"
    sentences = [f"{what}."]
    if len(seeds) > 1:
        listed = ", ".join(map(str, seeds))
        sentences.append(f"Means over seeds {listed}; ± is the standard error.")
    if found := report.get("checkpoints"):
        sentences.append(f"From {' and '.join(found)}.")
    if versions:
        device = versions.pop("device", None)
        made = [f"on {device}"] if device else []
        made += [f"{name} {version}" for name, version in versions.items()]
        sentences.append(f"Run {', '.join(made)}.")
    seconds = number(report, "seconds")
    if seconds is not None:
        sentences.append(f"Everything took {seconds:,.0f} s.")
    return sentences


def _at(record: Any, path: Iterable[Any]) -> Any:
    """What stands at a path of keys and indices, None where it ends early."""
    for key in path:
        try:
            record = record[key]
        except (KeyError, IndexError, TypeError):
            return None
    return record


_Column = tuple[str, Callable[[Mapping[str, Any]], Cell]]
_Records = Sequence[tuple[str, Mapping[str, Any]]]


def _column(heading: str, form: str, *path: Any, scale: float = 1) -> _Column:
    """A column of the numbers at a path, written in a format; cells keep the report's numbers."""

    def cell(record):
        value = number(record, *path)
        return Cell(value, MISSING if value is None else form.format(scale * value))

    return heading, cell


def _trained(record: Mapping[str, Any]) -> Cell:
    """The parameters that are trained, and their share of the model's."""
    trained, total = number(record, "trained"), number(record, "total")
    if trained is None:
        return Cell(None, MISSING)
    return Cell(trained, f"{trained:,.0f}" + (f" ({trained / total:.1%})" if total else ""))


_PARAMETERS: tuple[_Column, ...] = (
    ("trained parameters", _trained),
    _column("stored for each task", "{:,.0f}", "stored"),
)


def _place(timing: tuple[int, int]) -> str:
    batch, length = timing
    return f"batch {batch}, input length {length:,}"


def _keys(records: _Records, path: Iterable[Any]) -> list[str]:
    """The keys that any record has at a path, each once, in the order of the records."""
    found = (_at(record, path) or () for _, record in records)
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _speed_columns(records: _Records, key: str) -> list[_Column]:
    """Of one timing: encoder and whole answers, each against every reference; training."""
    parts = {"encoder": "encoder", "end_to_end": "end to end"}
    columns = []
    for part, heading in parts.items():
        columns.append(_column(f"{heading}, ms", "{:,.1f}", "speed", key, f"{part}_ms"))
        path = ("speed", key, f"{part}_speed_up")
        for reference in _keys(records, path):
            columns.append(_column(f"{heading} over {reference}", "{:.2f}x", *path, reference, 0))
        if part == "encoder":
            columns.append(_column("FLOPs ratio", "{:.2f}", "speed", key, "flops_ratio"))
    step = "training step"
    columns.append(_column(f"{step}, ms", "{:,.1f}", "speed", key, "train_step_ms"))
    in_mb = _column(f"{step}, MB", "{:,.0f}", "speed", key, "train_step_bytes", scale=1e-6)
    return [*columns, in_mb]


def _tpu_columns(records: _Records) -> list[_Column]:
    """Of each chip that any recipe was compiled for."""
    columns = []
    for chip in _keys(records, ["tpu"]):
        columns += [
            _column(f"{chip} encoder, cycles", "{:,.0f}", "tpu", chip, "encoder_cycles"),
            _column(f"{chip} encoder over {DENSE}", "{:.2f}x", "tpu", chip, "encoder_speed_up"),
        ]
    return columns


def _detection_tables(records: _Records) -> list[Table]:
    """Of each set out of distribution, how well each score tells it apart, beside the accuracy."""
    asked = [(name, record) for name, record in records if record.get("detection")]
    found, path = [], ("detection", "sets")
    for of_set in _keys(asked, path):
        scores = _keys(asked, [*path, of_set])
        for metric, named in _DETECTION.items():
            places = {score: ("{:.3f}", 1, [*path, of_set, score, metric]) for score in scores}
            places = {"accuracy, %": ("{:.1f}", 100, ["detection", "accuracy"]), **places}
            columns = [_mean_column(heading, *place) for heading, place in places.items()]
            found.append(_table(f"Out of distribution: {of_set}, {named}", columns, asked))
    return found


def _mean_column(heading: str, form: str, scale: float, path: Sequence[Any]) -> _Column:
    """A column of the means at a path."""
    return heading, lambda record: _with_error(form, scale, record, *path)


def _with_error(form: str, scale: float, record: Any, *path: Any) -> Cell:
    """The mean at a path with its standard error."""
    mean, error = (number(record, *path, part) for part in ("mean", "error"))
    if mean is None:
        return Cell(None, MISSING)
    parts = [mean] if error is None else [mean, error]
    return Cell(mean, " ± ".join(form.format(scale * part) for part in parts))


def _table(title: str, columns: Sequence[_Column], records: _Records) -> Table:
    """The table, without columns that are empty."""
    cells = {heading: [cell(record) for _, record in records] for heading, cell in columns}
    cells = {h: column for h, column in cells.items() if any(c.value is not None for c in column)}
    rows = [(name, tuple(c[i] for c in cells.values())) for i, (name, _) in enumerate(records)]
    return Table(title, tuple(cells), tuple(rows))
