"""How well a score tells inputs that are in distribution from others, by scikit-learn.

Axis letters: N inputs in distribution, M inputs out of it.
"""

from collections.abc import Callable, Mapping
import math

from jaxtyping import Float
import numpy as np

from coda_jax import checks
from coda_jax.optional import needs

TPR = 0.95
LEVEL = 0.95  # of intervals
FALSE_ALARMS = checks.Number(least=0, below=1)
METRICS = ("auroc", "fpr_at_95_tpr", "aupr_in", "aupr_out")


def detection(
    inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]
) -> dict[str, float]:
    """{name of `METRICS`: value} of a score that is higher for what is in distribution.

    The AUROC is 0.5 for a score that tells nothing. The FPR is the share of the inputs out of
    distribution that pass where at least 95 % of the others do. The areas under precision and
    recall are average precisions, with either kind as the one that is looked for.

    Args:
        inside: [N] scores of the inputs that are in distribution.
        outside: [M] of the others.

    Raises:
        ValueError: there are none, or they are not finite.
    """
    with needs():  # Here: not every installation has it.
        from sklearn.metrics import auc, average_precision_score, roc_curve

    kinds = np.repeat([1, 0], [len(inside), len(outside)])
    scores = np.concatenate([_checked("in", inside), _checked("out of", outside)])
    false, true, _ = roc_curve(kinds, scores, drop_intermediate=False)
    return {
        "auroc": float(auc(false, true)),
        "fpr_at_95_tpr": float(false[np.argmax(true >= TPR)]),
        "aupr_in": float(average_precision_score(kinds, scores)),
        "aupr_out": float(average_precision_score(1 - kinds, -scores)),
    }


def intervals(
    metrics: Callable[..., Mapping[str, float]],
    *samples: Float[np.ndarray, "..."],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """{name: (low, high)} of the central 95 % of a metric over bootstrap samples.

    Args:
        metrics: (one array for each sample) -> {name: value}, such as `detection`.
        *samples: arrays, each of which is drawn from by itself, with replacement.
        resamples: how often.
        seed: of the draws.
    """
    with needs():
        import sklearn

    checks.COUNT("BOOTSTRAP", resamples)
    rng = np.random.default_rng(checks.SEED("SEED", seed))
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):  # for speed
        found = [
            metrics(*(sample[rng.integers(len(sample), size=len(sample))] for sample in samples))
            for _ in range(resamples)
        ]
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    ends = {name: np.quantile([values[name] for values in found], tails) for name in found[0]}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def threshold(inside: Float[np.ndarray, " n"], false_alarms: float) -> float:
    """The highest threshold below which at most a share of the inputs in distribution is.

    An input with a score below it is taken for out of distribution.

    Args:
        inside: [N] scores of inputs in distribution.
        false_alarms: the share, from 0 to below 1.

    Raises:
        ValueError: there are no scores, they are not finite, or the share is out of its range.
    """
    FALSE_ALARMS("FALSE_ALARMS", false_alarms)
    scores = np.sort(_checked("in", inside))
    # The product of a share such as 0.29 and 100 must not be below 29.
    return float(scores[math.floor(false_alarms * len(scores) + 1e-9)])


def _checked(where, scores):
    scores = np.asarray(scores, np.float64)
    if not scores.size:
        raise ValueError(f"there are no inputs {where} distribution")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores of inputs {where} distribution are not finite")
    return scores
