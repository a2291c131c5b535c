"""Scores of an input's features, by how near they are to those of the training examples.

Higher means in distribution: distances have a minus. All of it is float64, and what float32 does
not resolve in the features is no variance.

Axis letters: N training examples, B inputs, D features, C labels.
"""

from collections.abc import Mapping
import functools

from jaxtyping import Float, Int
import numpy as np

from coda_jax import checks
from coda_jax.optional import needs

# Classes of `sklearn.covariance`. It and SciPy are imported where they are used: not every
# installation has them.
SHRINKAGES: Mapping[str, str] = {
    "ledoit_wolf": "LedoitWolf",
    "oas": "OAS",
    "none": "EmpiricalCovariance",
}
DISTANCES = ("mahalanobis", "relative_mahalanobis", "cosine", "neighbours")
_RESOLUTION = 1e-6  # of float32 features, relative to the largest: a few units in the last place


class Distances:
    """Distances to training examples.

    Covariances are scikit-learn's, by the name of their shrinkage. A variance that float32 does not
    resolve is raised to the least that it does: an input that leaves the directions of the
    training examples is then far, not infinitely so. Where no label has two different examples,
    the covariance within labels is that of all examples.

    Args:
        features: [N, D] of the training examples.
        labels: [N] the number of each one's label.
        shrinkage: one of `SHRINKAGES`.
        neighbours: the number of the neighbour whose distance counts.

    Raises:
        ValueError: features that are not finite or have other labels than examples; an unknown
            shrinkage; fewer examples than neighbours.
    """

    def __init__(
        self,
        features: Float[np.ndarray, "n d"],
        labels: Int[np.ndarray, " n"],
        *,
        shrinkage: str = "ledoit_wolf",
        neighbours: int = 10,
    ):
        self._shrinkage = checks.OneOf(tuple(SHRINKAGES))("SHRINKAGE", shrinkage)
        self._neighbours = neighbours
        self._features = _table("features of training examples", features)
        count = len(self._features)
        if count != len(labels):
            raise ValueError(f"{count} training examples have {len(labels)} labels")
        check_neighbours(neighbours, count)
        self._least = max((_RESOLUTION * np.abs(self._features).max()) ** 2, np.finfo(float).tiny)
        _, self._labels = np.unique(labels, return_inverse=True)

    def scores(self, features: Float[np.ndarray, "b d"]) -> dict[str, Float[np.ndarray, " b"]]:
        """{name of `DISTANCES`: the score of each input, [B]}.

        Args:
            features: [B, D] of the inputs.

        Raises:
            ValueError: features that are not finite, or more or fewer than the training examples'.
        """
        return {name: getattr(self, name)(features) for name in DISTANCES}

    def mahalanobis(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, " b"]:
        """-min_c (x - m_c)^T S^-1 (x - m_c), m_c a label's mean, S the covariance within labels.

        Lee et al. 2018, A Simple Unified Framework for Detecting Out-of-Distribution Samples and
        Adversarial Attacks.

        Args:
            features: [B, D].
        """
        means, whitening = self._within
        return -_nearest(self._checked(features), means, whitening)

    def relative_mahalanobis(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, " b"]:
        """`mahalanobis` plus the distance from one Gaussian of all examples, whatever their labels.

        Ren et al. 2022, A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection.

        Args:
            features: [B, D].
        """
        mean, whitening = self._overall
        return self.mahalanobis(features) + _nearest(self._checked(features), mean, whitening)

    def cosine(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, " b"]:
        """The cosine to the nearest training example; 0 for features that are all zero.

        Args:
            features: [B, D].
        """
        distances, _ = self._by_cosine.kneighbors(self._checked(features))
        return 1 - distances[:, -1]

    def neighbours(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, " b"]:
        """Minus the distance to the k-th nearest training example, of features of length 1.

        Sun et al. 2022, Out-of-Distribution Detection with Deep Nearest Neighbors.

        Args:
            features: [B, D].
        """
        distances, _ = self._by_distance.kneighbors(_of_length_1(self._checked(features)))
        return -distances[:, -1]

    def _checked(self, features):
        features, width = _table("features of inputs", features), self._features.shape[1]
        if features.shape[1] != width:
            raise ValueError(f"inputs have {features.shape[1]} features, training examples {width}")
        return features

    @functools.cached_property
    def _within(self):
        """(means of the labels [C, D], whitening [D, D])."""
        counts = np.bincount(self._labels)
        means = np.zeros((len(counts), self._features.shape[1]))
        np.add.at(means, self._labels, self._features)
        means /= counts[:, None]
        spread = self._features - means[self._labels]
        if (spread**2).max() <= self._least:
            spread = self._features - self._features.mean(0)
        return means, self._whitening(spread)

    @functools.cached_property
    def _overall(self):
        """(mean of all examples [1, D], whitening [D, D])."""
        mean = self._features.mean(0, keepdims=True)
        return mean, self._whitening(self._features - mean)

    def _whitening(self, spread):
        """[D, D] W with W W^T = S^-1; where there is no spread at all, S is the identity."""
        if (spread**2).max() <= self._least:
            return np.eye(spread.shape[1])
        with needs():
            from sklearn import covariance

        estimator = getattr(covariance, SHRINKAGES[self._shrinkage])
        estimator = estimator(store_precision=False, assume_centered=True)
        variances, directions = np.linalg.eigh(estimator.fit(spread).covariance_)
        return directions / np.sqrt(np.maximum(variances, self._least))

    @functools.cached_property
    def _by_cosine(self):
        return _searched(self._features, 1, metric="cosine")

    @functools.cached_property
    def _by_distance(self):
        return _searched(_of_length_1(self._features), self._neighbours)


def check_neighbours(neighbours: int, count: int) -> None:
    """Raises ValueError where so many training examples have no such neighbour."""
    if checks.COUNT("NEIGHBOURS", neighbours) > count:
        raise ValueError(f"NEIGHBOURS={neighbours}: there are only {count} training examples")


def _searched(features, neighbours, **options):
    with needs():
        from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=neighbours, algorithm="brute", **options).fit(features)


def _table(name, features):
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not features.size:
        raise ValueError(f"{name} must be [examples, features], got the shape {features.shape}")
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
        raise ValueError(f"{name} are not finite: number {row} (the first is 0)")
    return features


def _nearest(features, means, whitening):
    """The squared distance to the nearest of the means, [B]."""
    with needs():
        from scipy.spatial.distance import cdist

    return cdist(features @ whitening, means @ whitening, "sqeuclidean").min(-1)


def _of_length_1(features):
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    return features / np.where(lengths > 0, lengths, 1)
