"""`metrics.csv` in a run's folder: what was measured, one row for each step.

The file is a function of the run alone: it holds no times, and a run that goes on from a
checkpoint first cuts off the rows behind it. So that of a run that was cut off has the bytes of an
uncut one's.
"""

from collections.abc import Mapping
import csv
import io
import os
import pathlib

from coda_jax import files

METRICS = "metrics.csv"
SPEED = "examples_per_second"  # the one metric that is another in each run: it is not in the file
EVALUATION = "eval/"  # before the metrics of held-out data
_STEP = "step"  # the first column

Rows = dict[int, dict[str, float]]


def read_metrics(directory: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
    """{metric: [(step, value), ...]} of a run's folder, steps ascending.

    Args:
        directory: of the run, which may still be training.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not what a run writes; its line is named.
    """
    path = pathlib.Path(directory, METRICS)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no metrics of a run are in this folder")
    found: dict[str, list[tuple[int, float]]] = {}
    for step, cells in _read(path).items():
        for name, value in cells.items():
            found.setdefault(name, []).append((step, value))
    return found


class MetricsFile:
    """Writes the file, on disk at every return.

    Args:
        directory: of the run.
        step: from which the run goes on; the rows of later ones are cut off.

    Raises:
        ValueError: the file is not what a run writes.
    """

    def __init__(self, directory: str | os.PathLike, step: int):
        self._path = pathlib.Path(directory, METRICS)
        self._rows = {x: row for x, row in _read(self._path).items() if x <= step}
        self._columns = dict.fromkeys(name for row in self._rows.values() for name in row)
        if self._rows:
            self._write_all()
        else:
            self._path.unlink(missing_ok=True)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the row of a step, the last one or a later one."""
        cells = {name: float(value) for name, value in metrics.items()}
        appends = step not in self._rows and cells.keys() <= self._columns.keys()
        self._rows.setdefault(step, {}).update(cells)
        self._columns |= dict.fromkeys(cells)
        if not appends or not self._path.exists():
            self._write_all()
            return
        with open(self._path, "a", encoding="utf-8", newline="") as file:
            file.write(_line(self._cells(step)))
            file.flush()
            os.fsync(file.fileno())

    def _cells(self, step: int) -> list[int | str]:
        row = self._rows[step]
        return [step, *(repr(row[name]) if name in row else "" for name in self._columns)]

    def _write_all(self) -> None:
        lines = map(_line, [[_STEP, *self._columns], *map(self._cells, self._rows)])
        files.write_text(self._path, "".join(lines))


def _line(cells: list) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _read(path: pathlib.Path) -> Rows:
    """The rows of a file; none where there is no file.

    A last line without an end is not read: a kill cut it off, before its step was saved.
    """
    text = path.read_bytes() if path.is_file() else b""
    whole = text[: text.rfind(b"\n") + 1].decode("utf-8", "replace")
    lines = csv.reader(io.StringIO(whole, newline=""))
    rows: Rows = {}
    try:
        first, *names = next(lines, [_STEP])
        if first != _STEP:
            raise ValueError(f"the first column is {first!r}, not {_STEP!r}")
        last = 0
        for step, *cells in lines:
            if len(cells) != len(names):
                raise ValueError(f"{len(cells)} values of {len(names)} metrics")
            if int(step) <= last:
                raise ValueError(f"step {step} is not behind step {last}")
            last = int(step)
            rows[last] = {name: float(x) for name, x in zip(names, cells, strict=True) if x}
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}:{lines.line_num} is not what a run writes ({error}): move the file away"
        ) from error
    return rows
