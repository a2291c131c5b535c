"""What a training run keeps on disk and how it stops: checkpoints, logs, SIGTERM."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import importlib.util
import json
import os
import pathlib
import signal
from typing import Any

import jax
import orbax.checkpoint as ocp

from coda_jax import files, trees
from coda_jax.optional import needs

RUN_FILE = "run.json"  # in a run's folder: what the run is
FORMAT_VERSION = 2  # of that file
CHECKPOINTS = "checkpoints"  # in a run's folder: one folder for each step that is kept


class Interruption(Exception):
    """The run was asked to stop; its state is saved and the same command continues it."""


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM only sets the flag that the yielded function returns."""
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def metric_writer(directory: str | pathlib.Path) -> Iterator[Callable[[int, Mapping], None]]:
    """Yields write(step, metrics): to TensorBoard, through clu, where that is installed."""
    if not all(map(importlib.util.find_spec, ("clu", "tensorflow", "tensorboard"))):
        yield lambda step, metrics: None
        return
    with needs():  # imports tensorflow, which accelerator hosts may lack
        from clu import metric_writers

    writer = metric_writers.SummaryWriter(os.fspath(directory))
    try:
        yield writer.write_scalars
    finally:
        writer.close()


def claim_directory(directory: str | pathlib.Path, run: Mapping[str, Any]) -> pathlib.Path:
    """Makes the directory a run's own: its description is in its `RUN_FILE`.

    Raises:
        ValueError: the directory holds another run; the differences are listed.
    """
    directory = pathlib.Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    run = json.loads(json.dumps({"format_version": FORMAT_VERSION, **run}))
    path = directory / RUN_FILE
    if not path.exists():
        files.write_json(path, run)
        return directory
    found = files.read_json(path)
    if found.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory} holds a run of format_version={found.get('format_version', 1)}, which "
            f"this version ({FORMAT_VERSION}) cannot continue: `coda convert` turns it into a "
            "checkpoint or an adapter to start from, in another directory"
        )
    there, here = trees.flatten(found), trees.flatten(run)
    differences = [
        f"  {key}: there {there.get(key)!r}, here {here.get(key)!r}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise ValueError(
            f"{directory} holds another run; choose another directory:\n" + "\n".join(differences)
        )
    return directory


class RunCheckpoints:
    """The checkpoints of one run, written in the background, through orbax."""

    def __init__(
        self,
        directory: str | pathlib.Path,
        run: Mapping[str, Any],
        keep: int,
        best_metric: str | None = None,
        best_mode: str = "max",
    ):
        directory = claim_directory(directory, run)
        self._manager = ocp.CheckpointManager(
            directory / CHECKPOINTS,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                best_fn=None if best_metric is None else lambda metrics: metrics[best_metric],
                best_mode=best_mode,
                cleanup_tmp_directories=True,
            ),
        )
        self._by_metric = best_metric is not None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._manager.close()

    def save(self, state, metrics: Mapping[str, float] | None) -> None:
        """Saves the state under its step; returns before the files are complete."""
        metrics = dict(metrics or {})
        items = {"state": ocp.args.StandardSave(state), "evaluation": ocp.args.JsonSave(metrics)}
        self._manager.save(
            int(state.step), args=ocp.args.Composite(**items), metrics=metrics or None
        )

    def restore(self, state, step: int | None = None) -> tuple[Any, dict[str, float]]:
        """The newest checkpoint, or that of `step`, in the place of `state`; and its metrics.

        Without any checkpoint, `state` itself and no metrics.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None:
            return state, {}
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = {"state": ocp.args.StandardRestore(abstract), "evaluation": ocp.args.JsonRestore()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return restored["state"], restored["evaluation"]

    def best(self, state) -> tuple[Any, dict[str, float]]:
        """The best checkpoint where a metric chooses, else the newest; and its metrics."""
        self._manager.wait_until_finished()
        return self.restore(state, self._manager.best_step() if self._by_metric else None)
