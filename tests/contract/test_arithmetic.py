"""The compiled program does the work that is counted by hand, and no more (invariant 8)."""

import functools

from contract.table import FAMILIES, each_case
from helpers import without_loops
import jax
import pytest

from coda_jax.models import param_shapes
from coda_jax.objectives import model_for
from coda_jax.profiling import flops, timing

BATCH, LENGTH = 2, 256


def wide(case):
    """The family's smallest published sizes in one layer: nearly all of it is matrix products."""
    sizes = FAMILIES[case.family].presets.values()
    smallest = min(sizes, key=lambda config: config.emb_dim * config.num_encoder_layers)
    return smallest.replace(
        num_encoder_layers=1,
        num_decoder_layers=min(1, smallest.num_decoder_layers),
        methods=case.methods,
    )


@functools.cache
def compiled_flops(config):
    """XLA's count of operations of encoding a batch."""
    encode = jax.jit(model_for(config).encode)
    inputs = config.input_spec(BATCH, LENGTH)
    with without_loops():
        return timing.flops(encode.lower(param_shapes(config), inputs).compile())


@each_case("arithmetic")
def test_compiled_work_is_that_of_the_formula(case):
    """Within 5 %, and what a method adds or saves within 10 %: norms, softmaxes and sorts."""
    config = wide(case)
    found, expected = (count(config) for count in (compiled_flops, by_hand))
    assert found == pytest.approx(expected, rel=0.05)
    dense = config.dense()
    difference, by_formula = found - compiled_flops(dense), expected - by_hand(dense)
    print(
        case,
        found / expected,
        difference,
        by_formula,
        difference / max(by_formula, 1),
        (difference - by_formula) / expected,
    )
    assert difference == pytest.approx(by_formula, rel=0.1)


def by_hand(config):
    """The count of operations that the package gives."""
    return flops.encoder_flops(config, BATCH, LENGTH)
