"""Scores of the labels' logits; higher means in distribution.

Logits are those of a head, or the log-probabilities of the labels' texts, which need not add up
to 1.

Axis letters: B inputs, C labels.
"""

from collections.abc import Callable, Mapping

from jaxtyping import Float
import numpy as np

Score = Callable[[Float[np.ndarray, "b c"]], Float[np.ndarray, " b"]]


def max_softmax(logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
    """The probability of the most probable label, max_c softmax(logits)_c, [B] float64.

    Hendrycks & Gimpel 2017, A Baseline for Detecting Misclassified and Out-of-Distribution Examples
    in Neural Networks.

    Args:
        logits: [B, C].
    """
    return 1 / _exponentials(logits).sum(-1)


def energy(logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
    """log sum_c exp(logits_c), [B] float64: the energy of Liu et al. 2020, with its sign turned.

    Liu et al. 2020, Energy-based Out-of-distribution Detection.

    Args:
        logits: [B, C].
    """
    return np.asarray(logits, np.float64).max(-1) + np.log(_exponentials(logits).sum(-1))


def _exponentials(logits):
    logits = np.asarray(logits, np.float64)
    return np.exp(logits - logits.max(-1, keepdims=True))


CONFIDENCE: Mapping[str, Score] = {"max_softmax": max_softmax, "energy": energy}
