"""Which groups of several sets go first, against a loop in numpy."""

import numpy as np
import pytest

from coda_jax.methods.pruning import keep_best

COSTS = {"heads": 96, "channels": 6}  # weights of a group
LEAST = {"heads": 1, "channels": 8}


def kept_by_hand(scores, masks, density):
    """One after the other goes the group that has the least for its weights, if there is room."""
    masks = {path: mask.copy() for path, mask in masks.items()}
    total = sum(COSTS[path] * mask.size for path, mask in masks.items())
    ranked = []
    for path, mask in masks.items():
        values = np.where(mask > 0, scores[path], 0).astype(np.float64)
        shares = values**2 / (values**2).sum() / COSTS[path]
        staying = np.argsort(-values, kind="stable")[: LEAST[path]]
        ranked += [(shares[i], path, i) for i in np.flatnonzero(mask) if i not in staying]
    left = sum(COSTS[path] * mask.sum() for path, mask in masks.items())
    for _, path, i in sorted(ranked):
        if total - (left := left - COSTS[path]) > (1 - density) * total * (1 + 1e-6):
            break
        masks[path][i] = 0
    return masks


@pytest.mark.parametrize("density", [0.9, 0.6, 0.3, 0.05])
def test_what_has_the_least_for_its_weights_goes_first(rng, density):
    scores = {"heads": rng.random(6), "channels": rng.random(64)}
    masks = {path: np.ones(x.shape, np.float32) for path, x in scores.items()}
    masks["channels"][5:10] = 0  # are gone already
    found = keep_best(scores, masks, COSTS, LEAST, density)
    for path, expected in kept_by_hand(scores, masks, density).items():
        np.testing.assert_array_equal(found[path], expected, err_msg=path)


def test_sets_of_equal_worth_lose_alike():
    """However many groups they have, and however large these are."""
    scores = {"heads": np.linspace(1, 1.5, 16), "channels": np.linspace(3, 4.5, 256)}
    masks = {path: np.ones(x.shape, np.float32) for path, x in scores.items()}
    found = keep_best(scores, masks, COSTS, LEAST, 0.5)
    assert [float(np.mean(found[path])) for path in found] == pytest.approx([0.5, 0.5], abs=0.07)
