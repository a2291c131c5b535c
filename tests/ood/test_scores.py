"""Scores of labels' logits and of features, against SciPy, scikit-learn and brute force."""

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from sklearn import covariance

from coda_jax.ood.confidence import energy, max_softmax
from coda_jax.ood.distances import DISTANCES, SHRINKAGES, Distances


@pytest.fixture(name="trained")
def fixture_trained(rng):
    """(features [60, 7], labels [60]) of four labels, float32 as a model gives them."""
    labels = rng.integers(0, 4, 60)
    means, mixing = rng.normal(size=(4, 7)) * 3, rng.normal(size=(7, 7))
    return (means[labels] + rng.normal(size=(60, 7)) @ mixing).astype(np.float32), labels


@pytest.fixture(name="inputs")
def fixture_inputs(rng):
    return (3 * rng.normal(size=(20, 7))).astype(np.float32)


def test_confidence_is_scipys(rng):
    logits = (5 * rng.normal(size=(30, 9))).astype(np.float32)
    np.testing.assert_allclose(max_softmax(logits), softmax(logits, -1).max(-1), rtol=1e-6)
    np.testing.assert_allclose(energy(logits), logsumexp(logits, -1), rtol=1e-6)
    far = np.float32([[1e4, 0], [-3e38, -3e38], [-1e4, -1e4]])
    np.testing.assert_allclose(max_softmax(far), [1, 0.5, 0.5])
    np.testing.assert_allclose(energy(far), [1e4, -3e38, -1e4 + np.log(2)], rtol=1e-6)


REFERENCES = {
    "ledoit_wolf": covariance.LedoitWolf,
    "oas": covariance.OAS,
    "none": covariance.EmpiricalCovariance,
}


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
def test_mahalanobis_is_the_distance_of_scikit_learns_covariance(trained, inputs, shrinkage):
    features, labels = trained
    means = np.stack([features[labels == label].mean(0, dtype=np.float64) for label in range(4)])
    within = REFERENCES[shrinkage](assume_centered=True).fit(features - means[labels])
    of_all = REFERENCES[shrinkage]().fit(features.astype(np.float64))
    nearest = np.min([within.mahalanobis(inputs - mean) for mean in means], axis=0)
    found = Distances(features, labels, shrinkage=shrinkage)
    np.testing.assert_allclose(found.mahalanobis(inputs), -nearest, rtol=1e-6)
    expected = of_all.mahalanobis(inputs) - nearest
    np.testing.assert_allclose(found.relative_mahalanobis(inputs), expected, rtol=1e-6, atol=1e-6)


def test_neighbours_are_those_of_brute_force(trained, inputs):
    features, labels = trained
    found = Distances(features, labels, neighbours=3)

    def of_length_1(x):
        return x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None]

    one, other = of_length_1(inputs), of_length_1(features)
    cosines = np.array([[a @ b for b in other] for a in one])
    distances = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in other] for a in one])
    np.testing.assert_allclose(found.cosine(inputs), cosines.max(1), rtol=1e-6)
    np.testing.assert_allclose(found.neighbours(inputs), -np.sort(distances)[:, 2], rtol=1e-6)
    assert found.scores(inputs).keys() == set(DISTANCES)


def test_far_inputs_score_lower_than_training_examples(trained, rng):
    features, labels = trained
    far = features + 40 * rng.choice([-1, 1], features.shape)
    found = Distances(features, labels)
    near, away = found.scores(features), found.scores(far)
    for name in DISTANCES:
        assert near[name].mean() > away[name].mean(), name


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
@pytest.mark.parametrize("case", ["one_each", "duplicates", "all_equal", "zeros", "flat", "large"])
def test_degenerate_training_examples_give_finite_scores(rng, shrinkage, case):
    """Singular covariances, one example for a label, duplicates: what is far stays the farthest."""
    features = rng.normal(size=(12, 30)).astype(np.float32)
    labels = np.arange(12)
    if case == "duplicates":  # that float32 tells apart in the last places
        features = np.repeat(features[:4], 3, axis=0) * (1 + 1e-7 * rng.normal(size=(12, 1)))
        labels = np.repeat(np.arange(4), 3)
    elif case in ("all_equal", "zeros"):
        features = np.repeat(features[:1] * (case == "all_equal"), 12, axis=0)
    elif case == "flat":
        features, labels = features * (np.arange(30) < 3), labels % 2
    elif case == "large":
        features, labels = features + 1e4 * (np.arange(30) == 0), labels % 3
    features = features.astype(np.float32)
    found = Distances(features, labels, shrinkage=shrinkage)
    far = features[:1] + 100 * rng.normal(size=(1, 30))
    own, away = found.scores(features), found.scores(far.astype(np.float32))
    for name in DISTANCES:
        assert np.isfinite([*own[name], *away[name]]).all(), name
    assert own["mahalanobis"].min() > away["mahalanobis"][0]
    assert own["cosine"].max() <= 1 + 1e-6


def test_what_is_no_table_of_features_is_refused(trained, inputs):
    features, labels = trained
    with pytest.raises(ValueError, match="60 training examples have 59 labels"):
        Distances(features, labels[1:])
    with pytest.raises(ValueError, match="NEIGHBOURS=61: there are only 60 training examples"):
        Distances(features, labels, neighbours=61)
    with pytest.raises(ValueError, match=r"SHRINKAGE must be one of \('ledoit_wolf', 'oas', "):
        Distances(features, labels, shrinkage="ledoit")
    with pytest.raises(ValueError, match="inputs have 6 features, training examples 7"):
        Distances(features, labels).cosine(inputs[:, :6])
    inputs[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"features of inputs are not finite: number 3"):
        Distances(features, labels).mahalanobis(inputs)
    with pytest.raises(ValueError, match=r"must be \[examples, features\], got the shape \(0, 7\)"):
        Distances(features[:0], labels[:0])
