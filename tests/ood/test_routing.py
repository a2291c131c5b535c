"""Scores of the router's weights, by hand in float64."""

import math

from helpers import TINY, config, random_params, random_tokens
import jax
import numpy as np
import pytest

from coda_jax.inference import Decoding
from coda_jax.objectives import model_for
from coda_jax.ood.outputs import Outputs

LABELS = [(5, 6, 1), (3, 1)]


def by_hand(weights, length, reduction):
    """(entropy, share of rejected candidates) of an input's weights [layers, N], with a minus."""
    k, found = math.ceil(length / reduction), []
    for layer in np.float64(weights):
        inner = layer[(layer > 0) & (layer < 1)]
        entropy = -(inner * np.log(inner) + (1 - inner) * np.log(1 - inner)).sum()
        found.append((entropy / k, (k - (layer >= 0.5).sum()) / k))
    return -np.mean(found, axis=0)


@pytest.mark.all
@pytest.mark.parametrize("head", [False, True])
def test_they_are_means_over_candidates_and_layers(rng, head):
    cfg = config(coda={"reduction": 2.0, "epsilon": 0.5}, num_encoder_layers=2)
    if head:
        cfg = cfg.encoder_only().replace(head="classification", labels=("a", "b"))
    params, lengths = random_params(cfg), [9, 4, 16]
    inputs = [random_tokens(rng, [n], n)[0] for n in lengths]
    outputs = Outputs(cfg, params, Decoding(batch_size=4), () if head else LABELS)
    found = {index: made.routing for index, made in outputs(inputs)}
    padded, seen = np.stack([np.pad(x, (0, 16 - len(x))) for x in inputs]), []
    weights = jax.jit(model_for(cfg).routing)(params, padded)
    for index, length in enumerate(lengths):
        expected = by_hand(weights[:, index, :length], length, 2)
        scores = found[index]["router_entropy"], found[index]["router_rejected"]
        np.testing.assert_allclose(scores, expected, rtol=1e-4)
        seen.append(expected)
    assert np.min(seen, axis=0)[0] < -0.1 and np.ptp(seen, axis=0).min() > 0  # they tell something


@pytest.mark.all
def test_a_model_that_does_not_route_has_none(rng):
    for cfg in (TINY, config(coda={"reduction": 1.0})):
        outputs = Outputs(cfg, random_params(cfg), Decoding(), LABELS)
        ((_, made),) = outputs([random_tokens(rng, [4], 4)[0]])
        assert made.routing == {}
