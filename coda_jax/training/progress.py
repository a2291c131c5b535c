"""The progress bar of a training run, which also finds losses that are not finite."""

from collections.abc import Callable, Mapping, Sequence
import math
import time

import jax
import numpy as np
from tqdm import tqdm

from coda_jax import processes
from coda_jax.objectives import Sums
from coda_jax.training.metrics_file import SPEED


class Progress:
    """The progress bar, and the check that no loss was missed that is not finite.

    Args:
        total_steps: of the run.
        start: the steps taken before.
        metrics_of: (sums) -> what is reported of them.
        unlogged: what `unlogged` gave where the run was cut off.
    """

    def __init__(
        self,
        total_steps: int,
        start: int,
        metrics_of: Callable[[Sums], dict[str, float]],
        unlogged: Sequence[Sequence[float]] = (),
    ):
        self._metrics_of = metrics_of
        self._step = start
        silent = not processes.is_first()
        self._bar = tqdm(total=total_steps, initial=start, unit="step", disable=silent)
        self._pending = [(step, Sums(*map(np.float32, values))) for step, *values in unlogged]
        self._before = len(self._pending)  # of them, taken before the run was cut off
        self._since = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._bar.close()

    def add(self, step: int, sums: Sums) -> None:
        """Notes a step's sums without waiting for the device."""
        self._step = step
        self._pending.append((step, sums))
        self._bar.update()

    def flush(self) -> dict[str, float]:
        """Metrics since the last call; FloatingPointError names a step whose loss is not finite."""
        pending = self._fetched()
        total = _total([sums for _, sums in pending])
        timed = _total([sums for _, sums in pending[self._before :]])
        self._pending, self._before = [], 0
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        metrics = self._metrics_of(total) | {SPEED: float(timed.examples) / seconds}
        self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics[SPEED]:.1f} examples/s")
        return metrics

    def unlogged(self) -> list[list[float]]:
        """[step, its sums, ...] of each since the last `flush`, of which it raises the errors.

        A `Progress` that is given them goes on as this one.
        """
        return [[step, *map(float, jax.tree.leaves(sums))] for step, sums in self._fetched()]

    def _fetched(self) -> list[tuple[int, Sums]]:
        self._pending = jax.device_get(self._pending)
        for step, sums in self._pending:
            if not math.isfinite(sums.loss):
                raise FloatingPointError(
                    f"the loss of step {step} is {sums.loss}: nothing is saved after the last "
                    "checkpoint"
                )
        return self._pending

    def show(self, metrics: Mapping[str, float], remark: str = "") -> None:
        """Prints an evaluation's metrics above the bar, and what there is to say of them."""
        self._since = time.monotonic()
        values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._bar.write(f"step {self._step}: {values}" + (remark and f" ({remark})"))


def _total(sums: Sequence[Sums]) -> Sums:
    return jax.tree.map(lambda *x: np.sum(x), *sums)
