"""Norms only."""

from helpers import TINY, TINY_SPEECH, random_params
import pytest

from coda_jax import methods, trees
from coda_jax.methods import Norms


@pytest.mark.parametrize("base", [TINY, TINY_SPEECH])
def test_norms_are_trained_and_nothing_else(base):
    """But for a head that the base lacks; merging leaves the parameters as they are."""
    config = base.replace(methods=(Norms(),))
    params = random_params(config)
    trained, _ = methods.partition(config, params)
    kinds = {path.rsplit("/", 2)[-2] for path in trees.flatten(trained)} - {"ctc_head"}
    assert kinds and all(kind.endswith("norm") for kind in kinds)
    merged, after = methods.merge(config, params)
    assert merged == config.dense() and after is params
