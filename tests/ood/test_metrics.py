"""How well scores tell: against definitions, and scikit-learn's other functions."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from coda_jax.ood.metrics import METRICS, detection, intervals, threshold


@pytest.fixture(name="scores")
def fixture_scores(rng):
    """Scores with ties, higher in distribution."""
    return np.round(rng.normal(1, 1, 200), 1), np.round(rng.normal(0, 1, 90), 1)


def test_metrics_are_their_definitions(scores):
    inside, outside = scores
    found = detection(inside, outside)
    assert found.keys() == set(METRICS)
    wins = (inside[:, None] > outside) + 0.5 * (inside[:, None] == outside)
    assert found["auroc"] == pytest.approx(wins.mean(), abs=1e-6)
    kinds, both = np.repeat([1, 0], [200, 90]), np.concatenate([inside, outside])
    assert found["auroc"] == pytest.approx(roc_auc_score(kinds, both), abs=1e-6)
    passing = [t for t in np.unique(both) if (inside >= t).mean() >= 0.95]
    assert found["fpr_at_95_tpr"] == pytest.approx((outside >= max(passing)).mean(), abs=1e-6)
    assert found["aupr_in"] == pytest.approx(average_precision_score(kinds, both), abs=1e-6)
    swapped = average_precision_score(1 - kinds, -both)
    assert found["aupr_out"] == pytest.approx(swapped, abs=1e-6)


def test_scores_that_tell_all_or_nothing(scores):
    inside, _ = scores
    same = detection(inside, inside)
    assert same["auroc"] == pytest.approx(0.5)
    assert same["aupr_in"] == pytest.approx(0.5, abs=0.05)
    assert detection(inside + 100, inside) == pytest.approx(
        {"auroc": 1, "fpr_at_95_tpr": 0, "aupr_in": 1, "aupr_out": 1}
    )


def test_intervals_are_of_the_seed_and_hold_the_value(scores):
    found = intervals(detection, *scores, resamples=60, seed=3)
    assert found == intervals(detection, *scores, resamples=60, seed=3)
    assert found != intervals(detection, *scores, resamples=60, seed=4)
    for name, value in detection(*scores).items():
        low, high = found[name]
        assert low < value < high, name


def test_an_interval_of_a_mean_is_that_of_its_standard_error(rng):
    right = rng.random(400) < 0.8
    ends = intervals(lambda x: {"accuracy": float(x.mean())}, right, resamples=2000)["accuracy"]
    error = np.sqrt(right.mean() * (1 - right.mean()) / 400)
    expected = right.mean() + 1.96 * error * np.array([-1, 1])
    np.testing.assert_allclose(ends, expected, atol=0.15 * error)


@pytest.mark.parametrize("false_alarms", [0, 0.05, 0.29, 0.999])
def test_a_threshold_gives_up_the_share_that_is_wanted_and_no_more(scores, false_alarms):
    inside = np.unique(scores[0] + 1e-3 * np.arange(200))
    found = threshold(inside, false_alarms)
    given_up = (inside < found).mean()
    assert given_up <= false_alarms + 1e-9
    above = inside[inside > found]
    assert not len(above) or (inside < above[0]).mean() > false_alarms


def test_bad_scores_are_named(scores):
    inside, outside = scores
    with pytest.raises(ValueError, match="there are no inputs out of distribution"):
        detection(inside, outside[:0])
    with pytest.raises(ValueError, match="scores of inputs in distribution are not finite"):
        detection(inside * np.nan, outside)
    with pytest.raises(ValueError, match="FALSE_ALARMS must be a number"):
        threshold(inside, 1)
