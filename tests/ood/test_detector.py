"""A detector as a file: the same scores afterwards, and what is said of files that are none."""

import json

from helpers import TINY, random_params
import numpy as np
import pytest

from coda_jax.checkpoints.tensor_files import read_metadata, read_tensors, write_tensors
from coda_jax.ood.detector import Detector, load_detector
from coda_jax.ood.outputs import Made

KEY = "coda_jax_detector"


@pytest.fixture(name="params", scope="module")
def fixture_params():
    return random_params(TINY)


@pytest.fixture(name="detector")
def fixture_detector(rng):
    features = {name: np.float32(rng.normal(size=(12, 4))) for name in ("encoder", "decoder")}
    thresholds = {"energy": -3.5, "encoder_cosine": 0.25}
    targets = ((5, 6, 1), (3, 1))
    return Detector(features, np.arange(12) % 2, targets, 64, "oas", 3, thresholds)


def test_scores_are_those_of_before(detector, params, rng, tmp_path):
    file = tmp_path / "x.safetensors"
    detector.save(file, TINY, params)
    loaded = load_detector(file, TINY, params)
    features = {name: np.float32(rng.normal(size=(5, 4))) for name in detector.features}
    made = Made(np.float32(rng.normal(size=(5, 2))), features, {"router_entropy": np.ones(5)})
    first, second = detector.scores(made), loaded.scores(made)
    assert first.keys() == second.keys() and len(first) == 2 + 2 * 4 + 1
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    kept = ("targets", "longest", "shrinkage", "neighbours", "thresholds")
    assert all(getattr(loaded, name) == getattr(detector, name) for name in kept)


def test_it_belongs_to_one_model(detector, params, tmp_path):
    file = tmp_path / "x.safetensors"
    detector.save(file, TINY, params)
    for config, others in ((TINY, random_params(TINY, seed=1)), (TINY.replace(eos_id=2), params)):
        with pytest.raises(ValueError, match=r"x\.safetensors belongs to another model"):
            load_detector(file, config, others)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 2}, "has version 2, this package reads 1"),
        ({"targets": [[5, -1]]}, r"targets\[0\]\[1\] must be a whole number"),
        ({"neighbours": 13}, "NEIGHBOURS=13: there are only 12 training examples"),
        ({"shrinkage": "some"}, "shrinkage must be one of"),
        ({"thresholds": {"energy": "low"}}, r"thresholds\['energy'\] must be a number"),
        ({"thresholds": [1]}, "thresholds must be an object"),
        ({"more": 1}, "its metadata must have"),
    ],
)
def test_bad_values_of_a_file_are_named(detector, params, tmp_path, changed, message):
    file = tmp_path / "x.safetensors"
    detector.save(file, TINY, params)
    tensors = {name: np.array(x) for name, x in read_tensors(file).items()}
    values = json.loads(read_metadata(file)[KEY]) | changed
    write_tensors(file, tensors, metadata={KEY: json.dumps(values)})
    with pytest.raises(ValueError, match=message):
        load_detector(file, TINY, params)


def test_what_is_no_detector_or_is_damaged_is_refused(detector, params, tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist"):
        load_detector(file, TINY, params)
    write_tensors(file, {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="is no detector: `coda ood` writes one"):
        load_detector(file, TINY, params)
    detector.save(file, TINY, params)
    file.write_bytes(file.read_bytes().replace(b"-3.5", b"-9.5"))
    with pytest.raises(ValueError, match="is damaged"):
        load_detector(file, TINY, params)
