"""How `coda predict` marks inputs that are out of distribution, instead of guessing answers."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from coda_jax import checks
from coda_jax.commands.loading import LoadedModel, sized
from coda_jax.inference import Decoding
from coda_jax.ood.detector import Detector, load_detector
from coda_jax.ood.outputs import Outputs
from coda_jax.sharding import Placement

MARKED, SCORE = "out_of_distribution", "ood_score"  # fields of a row


@dataclasses.dataclass(frozen=True)
class Marking:
    """By what inputs are marked.

    Attributes:
        detector: a file that `coda ood` wrote; None: nothing is marked.
        score: which of its scores tells.
        threshold: an input with a score below it is out of distribution; None for the file's.

    Raises:
        ValueError: a score or a threshold without a detector.
    """

    detector: str | None = None
    score: str | None = None
    threshold: float | None = None

    def __post_init__(self):
        checks.paths(DETECTOR=self.detector)
        checks.Maybe(checks.text)("OOD_SCORE", self.score)
        checks.Maybe(checks.Number())("THRESHOLD", self.threshold)
        given = {"OOD_SCORE": self.score, "THRESHOLD": self.threshold}
        if self.detector is None and (names := [x for x in given if given[x] is not None]):
            raise ValueError(f"{' and '.join(names)}: no effect without DETECTOR")

    def start(
        self,
        model: LoadedModel,
        decoding: Decoding,
        placement: Placement | None,
        **others: object,
    ) -> tuple["Marks | None", Decoding]:
        """What marks the inputs of a model, None for nothing, and the decoding with their limit.

        Args:
            model: that answers.
            decoding: how.
            placement: the devices; None for all.
            **others: what else is asked for, by name, whose outputs are no rows to mark; false
                where it is not.

        Raises:
            FileNotFoundError: there is no such detector.
            ValueError: it belongs to another model or limit, or has no such score; or there are
                `others`.
        """
        if self.detector is None:
            return None, sized(decoding, model)
        asked = others | {"ADAPTERS": model.adapters}
        if names := [name for name, given in asked.items() if given]:
            raise ValueError(f"DETECTOR marks the answers of one model: no {', '.join(names)}")
        detector = load_detector(self.detector, model.config, model.params)
        score = checks.OneOf([*detector.thresholds])("OOD_SCORE", self.score)
        if decoding.max_input_length not in (None, detector.longest):
            raise ValueError(
                f"{self.detector} is of inputs of at most {detector.longest}, not "
                f"Decoding.max_input_length={decoding.max_input_length}"
            )
        decoding = dataclasses.replace(decoding, max_input_length=detector.longest)
        outputs = Outputs(model.config, model.params, decoding, detector.targets, placement)
        threshold = detector.thresholds[score] if self.threshold is None else self.threshold
        return Marks(detector, outputs, score, threshold), decoding


@dataclasses.dataclass(frozen=True)
class Marks:
    """Scores inputs, and marks those that are out of distribution.

    Attributes:
        detector: the scores.
        outputs: what the model makes of inputs.
        score: the one that tells.
        threshold: below which an input is marked.
    """

    detector: Detector
    outputs: Outputs
    score: str
    threshold: float

    def __call__(self, inputs: Sequence[np.ndarray], first: int = 0) -> list[dict[str, Any]]:
        """{`MARKED`: whether it is out of distribution, `SCORE`: its score} of each input.

        Args:
            inputs: what the model takes; `first` is the number of the first.
        """
        found = dict(self.outputs(inputs, first))
        made = jax.tree.map(lambda *x: np.stack(x), *(found[i] for i in range(len(inputs))))
        scores = self.detector.scores(made)[self.score]
        return [{MARKED: bool(x < self.threshold), SCORE: float(x)} for x in scores]


def line(
    record: Mapping[str, Any], answer: Mapping[str, Any], mark: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A row: what was asked, its answer, and its mark; an answer that is marked is null."""
    if mark is None:
        return {**record, **answer}
    return {**record, **(dict.fromkeys(answer) if mark[MARKED] else answer), **mark}
