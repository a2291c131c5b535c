"""The best evaluation so far, and whether a run has waited long enough for a better one."""

from collections.abc import Mapping
from typing import Any

_CARRIED = ("step", "value", "waited")


class Best:
    """Follows one metric of the evaluations. It decides by their values alone, in their order.

    Args:
        metric: its name; None: nothing is followed.
        mode: "max" where more is better, or "min".
        patience: evaluations in a row without a better one after which `is_over`; None for never.
        first: the step before which no evaluation counts.
    """

    def __init__(self, metric: str | None, mode: str, patience: int | None, first: int = 0):
        self._metric, self._sign = metric, 1 if mode == "max" else -1
        self._patience, self._first = patience, first
        self._step, self._value, self._waited = 0, None, 0

    def go_on(
        self, step: int, metrics: Mapping[str, float], carried: Mapping[str, Any] | None
    ) -> None:
        """Goes on from a checkpoint.

        Args:
            step: of the checkpoint.
            metrics: of its evaluation; empty without one.
            carried: what `carried` was then; None where an older version saved it.
        """
        if carried is not None:
            self._step, self._value, self._waited = (carried[x] for x in _CARRIED)
        elif metrics:
            self.note(step, metrics)

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes notice of an evaluation; one that is as good as the best is not better."""
        if self._metric is None or step < self._first:
            return
        value = metrics[self._metric]
        if self._value is None or self._sign * value > self._sign * self._value:
            self._step, self._value, self._waited = step, value, 0
        else:
            self._waited += 1

    @property
    def carried(self) -> dict[str, Any]:
        """What `go_on` takes, as JSON."""
        return dict(zip(_CARRIED, (self._step, self._value, self._waited), strict=True))

    @property
    def is_over(self) -> bool:
        """Whether the patience has ended."""
        return self._patience is not None and self._waited >= self._patience

    @property
    def said(self) -> str:
        """What the last evaluation says of the metric; "" where nothing is followed."""
        if self._value is None:
            return ""
        if not self._waited:
            return f"the best {self._metric} so far"
        before = f"{self._waited} evaluation{'s' * (self._waited > 1)} before"
        text = f"the best {self._metric} was {self._value:.4f} at step {self._step}, {before}"
        return f"{text}: the run ends, patience={self._patience}" if self.is_over else text
