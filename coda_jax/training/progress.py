"""The progress bar of a training run, which also finds losses that are not finite."""

from collections.abc import Callable, Mapping
import math
import time

import jax
import numpy as np
from tqdm import tqdm

from coda_jax import processes
from coda_jax.objectives import Sums


class Progress:
    """The progress bar, and the check that no loss was missed that is not finite."""

    def __init__(
        self, total_steps: int, start: int, metrics_of: Callable[[Sums], dict[str, float]]
    ):
        self._metrics_of = metrics_of
        self._step = start
        silent = not processes.is_first()
        self._bar = tqdm(total=total_steps, initial=start, unit="step", disable=silent)
        self._pending: list[tuple[int, Sums]] = []
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
        pending, self._pending = jax.device_get(self._pending), []
        for step, sums in pending:
            if not math.isfinite(sums.loss):
                raise FloatingPointError(
                    f"the loss of step {step} is {sums.loss}: nothing is saved after the last "
                    "checkpoint"
                )
        total = jax.tree.map(lambda *x: np.sum(x), *[sums for _, sums in pending])
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        metrics = self._metrics_of(total) | {"examples_per_second": float(total.examples) / seconds}
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {metrics['examples_per_second']:.1f} examples/s"
        )
        return metrics

    def show(self, metrics: Mapping[str, float]) -> None:
        """Prints an evaluation's metrics above the bar."""
        self._since = time.monotonic()
        values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._bar.write(f"step {self._step}: {values}")
