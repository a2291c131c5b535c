"""What tells inputs that are out of distribution, as one file that `coda predict` reads.

The file is of safetensors: the features of the training examples, and as metadata, in JSON, all
else. Distances are fitted to the features when they are first asked for.

Axis letters: N training examples, B inputs, D features.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from coda_jax import checks, files
from coda_jax.checkpoints import config_json
from coda_jax.checkpoints.fingerprints import fingerprints
from coda_jax.checkpoints.tensor_files import read_metadata, read_tensors, write_tensors
from coda_jax.models import ModelConfig
from coda_jax.ood.confidence import CONFIDENCE
from coda_jax.ood.distances import SHRINKAGES, Distances, check_neighbours
from coda_jax.ood.outputs import Made

VERSION = 1
_KEY, _NUMBERS, _FEATURES = "coda_jax_detector", "label_numbers", "features."
_VALUES = {"version", "model", "targets", "shrinkage", "neighbours", "longest", "thresholds"}
_THRESHOLD = checks.Number()
_IDS = checks.Each(checks.Each(checks.Whole(least=0), least=1))


@dataclasses.dataclass(frozen=True)
class Detector:
    """All scores of inputs, and the thresholds below which they are out of distribution.

    Attributes:
        features: {name: [N, D] float32}, what the model makes of the training examples.
        numbers: [N] the number of each one's label.
        targets: tokens of each label's text; () where the model has a head.
        longest: the most tokens of an input that are read.
        shrinkage: of the covariances, see `Distances`.
        neighbours: the number of the neighbour whose distance counts.
        thresholds: {score: value}, known when inputs in distribution have been scored.
    """

    features: Mapping[str, Float[np.ndarray, "n d"]] = dataclasses.field(repr=False)
    numbers: Int[np.ndarray, " n"] = dataclasses.field(repr=False)
    targets: tuple[tuple[int, ...], ...] = dataclasses.field(repr=False)
    longest: int
    shrinkage: str = "ledoit_wolf"
    neighbours: int = 10
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _distances(self) -> dict[str, Distances]:
        options = {"shrinkage": self.shrinkage, "neighbours": self.neighbours}
        return {name: Distances(x, self.numbers, **options) for name, x in self.features.items()}

    def scores(self, made: Made) -> dict[str, Float[np.ndarray, " b"]]:
        """{name of a score: [B]}; higher means in distribution, whichever it is.

        Args:
            made: of B inputs.
        """
        found = {name: score(made.logits) for name, score in CONFIDENCE.items()}
        for feature, distances in self._distances.items():
            of_feature = distances.scores(made.features[feature])
            found |= {f"{feature}_{name}": score for name, score in of_feature.items()}
        return found | made.routing

    def save(self, path: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any]) -> None:
        """Writes the file.

        Args:
            path: of the file, whose folder exists.
            config, params: the model whose features these are.
        """
        tensors = {_FEATURES + name: values for name, values in self.features.items()}
        tensors[_NUMBERS] = np.asarray(self.numbers, np.float32)
        values = {
            "version": VERSION,
            "model": model_sha256(config, params),
            "targets": [[*map(int, target)] for target in self.targets],
            **{name: getattr(self, name) for name in ("longest", "shrinkage", "neighbours")},
            "thresholds": dict(self.thresholds),
        }
        metadata = {_KEY: json.dumps(values)}
        write_tensors(pathlib.Path(path), tensors, metadata=metadata)


def load_detector(
    path: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any]
) -> Detector:
    """Reads a file that `Detector.save` wrote.

    Args:
        path: of the file.
        config, params: the model that is asked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, is damaged, or belongs to another model.
    """
    path = pathlib.Path(path)
    tensors, values = read_tensors(path), _values(path)
    if values["version"] != VERSION:
        raise ValueError(f"{path} has version {values['version']!r}, this package reads {VERSION}")
    if values["model"] != model_sha256(config, params):
        raise ValueError(
            f"{path} belongs to another model: its checkpoint, adapter, REDUCTION and DTYPE must "
            "be those that `coda ood` had"
        )
    numbers = tensors.pop(_NUMBERS, np.zeros(0))
    features = {name.removeprefix(_FEATURES): np.array(x) for name, x in tensors.items()}
    if numbers.ndim != 1 or not numbers.size or not features:
        raise ValueError(f"{path} has no features of training examples")
    check_neighbours(values["neighbours"], len(numbers))
    return Detector(
        features,
        numbers.astype(np.int64),
        **{name: values[name] for name in _VALUES - {"version", "model"}},
    )


def model_sha256(config: ModelConfig, params: Mapping[str, Any]) -> str:
    """The SHA-256 of a model: its config with its methods, and all of its leaves."""
    described = [config_json.to_json(config), fingerprints(params)]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _values(path: pathlib.Path) -> dict[str, Any]:
    """What the metadata say, checked."""
    text = read_metadata(path).get(_KEY)
    if text is None:
        raise ValueError(f"{path} is no detector: `coda ood` writes one, with DETECTOR")
    values = files.json_value(text)
    if not isinstance(values, dict) or values.keys() != _VALUES:
        raise ValueError(f"{path}: its metadata must have {sorted(_VALUES)}, got {text!r:.80}")
    thresholds = values["thresholds"]
    if not isinstance(thresholds, dict):
        raise checks.wrong(f"{path}: thresholds", "an object", thresholds)
    return values | {
        "targets": _IDS(f"{path}: targets", values["targets"]),
        "longest": checks.COUNT(f"{path}: longest", values["longest"]),
        "shrinkage": checks.OneOf(tuple(SHRINKAGES))(f"{path}: shrinkage", values["shrinkage"]),
        "neighbours": checks.COUNT(f"{path}: neighbours", values["neighbours"]),
        "thresholds": {
            name: _THRESHOLD(f"{path}: thresholds[{name!r}]", x) for name, x in thresholds.items()
        },
    }
