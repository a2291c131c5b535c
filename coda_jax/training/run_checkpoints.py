"""The checkpoints of a run: saved whole or not at all, and checked when they are read.

Each step has a folder, written by orbax: the state, and `CONTENTS`, which says in JSON what the
state's leaves must be (a SHA-256 each), how it was evaluated, and what else the run that goes on
from it must know. Where several processes share a
run, each writes its part of the state; the first moves and removes checkpoints, and says which are
read.
"""

from collections.abc import Mapping, Sequence
import errno
import functools
import math
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from coda_jax import files, processes
from coda_jax.checkpoints.adapter import json_sha256
from coda_jax.checkpoints.fingerprints import leaf_sha256
from coda_jax.sharding import divided_as
from coda_jax.training.run_directory import CHECKPOINTS, RUN_FILE, saved_steps

STATE, CONTENTS = "state", "contents"  # in the folder of a step
DAMAGED = "damaged"  # in a run's folder: checkpoints that were set aside
_REPLACED = ".replaced"  # likewise: a checkpoint whose evaluation is being added
_REMOVED = ".removed"  # likewise: checkpoints that are being deleted


_OF_THE_MACHINE = (errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Saved(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
        state: the state.
        metrics: of its evaluation; empty without one.
        carried: what else was given to `RunCheckpoints.save`.
    """

    state: Any
    metrics: dict[str, float]
    carried: dict[str, Any]


class DamagedError(ValueError):
    """A checkpoint is not what was saved."""


def _by_path(state: Any) -> dict[str, Any]:
    """The leaves of a state by their paths, named as in orbax's own table."""

    def name(key):
        return str(next(getattr(key, x) for x in ("key", "name", "idx") if hasattr(key, x)))

    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {"/".join(map(name, path)): leaf for path, leaf in leaves}


def read_contents(folder: pathlib.Path) -> dict[str, Any]:
    """What the checkpoint in a step's folder must hold: "step", "leaves", "evaluation" and more.

    Raises:
        DamagedError: it is missing or was changed.
    """
    try:
        contents = dict(files.read_json(folder / CONTENTS / "metadata"))
        sound = (
            json_sha256(contents, "sha256") == contents["sha256"]
            and str(contents["step"]) == folder.name
        )
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise DamagedError(f"{CONTENTS} cannot be read: {_first_line(error)}") from error
    if not sound:
        raise DamagedError(f"{CONTENTS} is not what was saved")
    return contents


def check_leaves(contents: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Raises DamagedError unless the leaves {path: array} are those that were saved."""
    wrong = [path for path, leaf in leaves.items()
             if leaf_sha256(leaf) != contents["leaves"].get(path)]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DamagedError(f"the leaf {wrong[0]}{more} is not what was saved")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def check_finite(values: Mapping[str, Any], what: str, kept: str = "") -> None:
    """Raises FloatingPointError, naming the first, where values {name: array} are not finite.

    A scalar of an optimizer may be infinite, such as the best loss so far.

    Args:
        values: to check.
        what: they are.
        kept: what is left, for the error.
    """
    for name, value in values.items():
        array = np.asarray(value)
        if not jax.dtypes.issubdtype(array.dtype, np.inexact):
            continue
        if array.ndim == 0 and name.startswith("optimizer/"):
            finite = not np.isnan(array)
        else:
            finite = np.isfinite(array).all()
        if not finite:
            found = array[~np.isfinite(array)].flat[0]
            raise FloatingPointError(f"{what}: {name} holds {found}" + (kept and f"; {kept}"))


def recover(directory: pathlib.Path) -> None:
    """Clears away what a kill left in a run's folder, and undoes a `replace` that was cut off."""
    folder = directory / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / _REMOVED, ignore_errors=True)
    for torn in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(torn)
    for old in (directory / _REPLACED).glob("*"):
        if not (folder / old.name).exists():
            os.replace(old, folder / old.name)
    shutil.rmtree(directory / _REPLACED, ignore_errors=True)


class RunCheckpoints:
    """The checkpoints of one run, written in the background; call `recover` before.

    The newest is always kept: it is where the run goes on.

    Args:
        directory: the run's folder.
        run: what the run is; it is written when the first checkpoint is.
        keep: checkpoints kept.
        best_metric: name of the metric that chooses them; None: the newest.
        best_mode: "max" or "min".
        best_from: the step before which none is chosen for its metric.
        evaluated_on: what identifies the evaluation's data; metrics of others are not read.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        run: Mapping[str, Any],
        keep: int,
        best_metric: str | None = None,
        best_mode: str = "max",
        best_from: int = 0,
        evaluated_on: Any = None,
    ):
        self._directory, self._run, self._keep = directory.absolute(), run, keep
        self._folder = self._directory / CHECKPOINTS
        self._evaluated_on = json_sha256({"data": evaluated_on}, "sha256")
        self._metric, self._sign = best_metric, 1 if best_mode == "max" else -1
        self._best_from = best_from
        handlers = {STATE: ocp.StandardCheckpointHandler(), CONTENTS: ocp.JsonCheckpointHandler()}
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        if kind is not KeyboardInterrupt:  # which does not wait for what is being written
            self._checkpointer.wait_until_finished()
            self._checkpointer.close()
            self._remove_surplus()

    def save(
        self, state: Any, metrics: Mapping[str, float] | None, carried: Mapping[str, Any]
    ) -> None:
        """Saves the state under its step; returns before the files are complete.

        Args:
            state: with its `step`.
            metrics: of its evaluation, if there was one.
            carried: what else a run that goes on from here must know, as JSON.

        Raises:
            FloatingPointError: a leaf or a metric is not finite; nothing is saved.
        """
        self._checkpointer.wait_until_finished()
        self._remove_surplus()
        step, metrics = int(state.step), dict(metrics or {})
        leaves = _by_path(processes.fetch(state))
        self._check_finite(step, leaves, metrics)
        contents = {
            "step": step,
            "evaluation": metrics,
            "evaluated_on": self._evaluated_on,
            "carried": dict(carried),
            "leaves": {path: leaf_sha256(leaf) for path, leaf in leaves.items()},
        }
        contents["sha256"] = json_sha256(contents, "sha256")
        if processes.is_first() and not saved_steps(self._directory):
            files.write_json(self._directory / RUN_FILE, self._run)
        items = {STATE: ocp.args.StandardSave(state), CONTENTS: ocp.args.JsonSave(contents)}
        self._checkpointer.save(self._folder / str(step), args=ocp.args.Composite(**items))

    def _check_finite(self, step: int, leaves: Mapping, metrics: Mapping[str, float]) -> None:
        steps = saved_steps(self._directory)
        kept = f"the last good checkpoint is of step {steps[-1]}" if steps else "nothing is saved"
        check_finite(leaves, f"after step {step}", kept)
        check_finite(metrics, f"the evaluation after step {step}", kept)

    def replace(self, state: Any, metrics: Mapping[str, float], carried: Mapping[str, Any]) -> None:
        """Saves a state again, with its evaluation; a kill leaves one of the two. See `save`."""
        self._checkpointer.wait_until_finished()
        self._check_finite(int(state.step), {}, metrics)
        processes.from_first(lambda: self._move(int(state.step), _REPLACED))
        self.save(state, metrics, carried)
        self._checkpointer.wait_until_finished()
        if processes.is_first():
            shutil.rmtree(self._directory / _REPLACED)

    def restore(self, state: Any) -> Saved:
        """The newest sound checkpoint, its state in the place of `state`.

        Newer ones that are damaged are named and set aside. Without any checkpoint, `state` itself
        and nothing else.

        Raises:
            ValueError: no checkpoint is sound; each is named.
        """
        steps = processes.from_first(lambda: saved_steps(self._directory)[::-1])
        return self._first_sound(state, steps)

    def best(self, state: Any) -> Saved:
        """The best checkpoint where a metric chooses, else the newest; see `restore`.

        Raises:
            ValueError: as for `restore`.
        """
        self._checkpointer.wait_until_finished()
        steps = processes.from_first(lambda: [step for _, step in self._ranked()])
        return self._first_sound(state, steps)

    def _rank(self, step: int) -> float:
        """What orders the checkpoints, the best last: infinite where it is damaged."""
        try:
            evaluation = read_contents(self._folder / str(step))["evaluation"]
        except DamagedError:
            return math.inf
        if self._metric is None:
            return 0.0
        # Without the metric, it was saved before it was evaluated.
        counts = step >= self._best_from and self._metric in evaluation
        return self._sign * evaluation[self._metric] if counts else -math.inf

    def _ranked(self) -> list[tuple[float, int]]:
        """(rank, step): those that are damaged first, so that they are named; then from the best.

        Of equals the oldest is before the others where a metric chooses, else the newest.
        """
        found = ((self._rank(x), x) for x in saved_steps(self._directory))
        newest_first = -1 if self._metric is None else 1
        return sorted(found, key=lambda x: (-x[0], newest_first * x[1]))

    def _first_sound(self, state: Any, steps: Sequence[int]) -> Saved:
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                found = self._read(step, state)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            for number, reason in damaged.items():
                processes.from_first(functools.partial(self._move, number, DAMAGED))
                print(
                    f"the checkpoint of step {number} is damaged ({reason}) and is now in "
                    f"{self._directory / DAMAGED}; that of step {step} is taken",
                    flush=True,
                )
            return found
        if damaged:
            raise ValueError(
                f"all checkpoints in {self._folder} are damaged; start anew in another folder:"
                + "".join(f"\n  step {step}: {reason}" for step, reason in damaged.items())
            )
        return Saved(state, {}, {})

    def _read(self, step: int, state: Any) -> Saved:
        folder = self._folder / str(step)
        contents = read_contents(folder)
        # Whole in each process, so that all find the same damage.
        whole = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), state)
        items = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(whole)})
        try:
            restored = self._checkpointer.restore(folder, args=items)[STATE]
        except MemoryError:
            raise
        except Exception as error:  # whatever orbax and its libraries raise for damaged files
            if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
                raise
            raise DamagedError(f"it cannot be read: {_first_line(error)}") from error
        check_leaves(contents, _by_path(restored))
        of_these = contents.get("evaluated_on") == self._evaluated_on
        restored = divided_as(state, restored)
        metrics = dict(contents["evaluation"]) if of_these else {}
        return Saved(restored, metrics, dict(contents.get("carried", {})))  # older ones lack it

    def _remove_surplus(self) -> None:
        """Removes what is not to be kept of the checkpoints that are complete and sound."""
        if not processes.is_first():
            return
        newest = saved_steps(self._directory)[-1:]
        sound = [step for rank, step in self._ranked() if rank < math.inf]
        for step in {*sound[self._keep :]} - {*newest}:
            self._move(step, _REMOVED)
        shutil.rmtree(self._directory / _REMOVED, ignore_errors=True)

    def _move(self, step: int, place: str) -> None:
        """Moves a checkpoint into another folder of the run, in the place of an older one."""
        target = self._directory / place / str(step)
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self._folder / str(step), target)
