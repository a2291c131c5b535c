"""Fresh methods are the base, and what is merged or finished gives what it gave before."""

from contract.programs import base_params, batch_of, coda_of, fresh_params, outputs, params
from contract.table import each_case
from helpers import assert_same_tree
import jax
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.methods import METHODS
from coda_jax.methods.base import Method
from coda_jax.methods.coda import with_reduction
from coda_jax.models import param_shapes


@each_case("outputs")
def test_fresh_methods_leave_the_base_as_it_is(case):
    """Invariant 1, at a reduction of 1 where there is routing."""
    config = case.config
    if not all(method.starts_as_base for method in config.methods):
        pytest.skip("a fresh method changes the model, as it says")
    everything = config
    if coda_of(config) is not None:
        everything = config.replace(methods=with_reduction(config.methods, 1))
    dense = config.dense()
    np.testing.assert_allclose(
        outputs(everything, fresh_params(config), batch_of(config)),
        outputs(dense, base_params(dense), batch_of(config)),
        atol=1e-5,
    )


@each_case("outputs")
def test_what_is_merged_gives_the_same_outputs(case):
    """Invariant 10; a method that cannot be merged stays as it is."""
    config, before = case.config, params(case.config)
    merged, after = methods.merge(config, before)
    check_folded(config, before, merged, after)
    for method in config.methods:
        if type(method).merge is Method.merge:
            assert method in merged.methods
    if merged == config:
        assert_same_tree(after, before)
    again, once_more = methods.merge(merged, after)
    assert again == merged
    assert_same_tree(once_more, after)


@each_case("outputs")
def test_what_is_finished_gives_the_same_outputs(case):
    """And is finished once and for all."""
    config, before = case.config, params(case.config)
    finished, after = methods.finish(config, before)
    check_folded(config, before, finished, after)
    again, once_more = methods.finish(finished, after)
    assert again == finished
    assert_same_tree(once_more, after)


def check_folded(config, before, folded, after):
    """The config and the tree that were folded belong together, and answer as those before."""
    assert folded.dense() == config.dense()
    assert {method.name for method in folded.methods} <= {method.name for method in config.methods}
    trees.check_tree(param_shapes(folded), after)
    new = trees.split(after, tuple(p for m in METHODS.values() for p in m.creates))[0]
    assert new == trees.split(new, methods.created(folded))[0]
    if folded == config and jax.tree.all(jax.tree.map(np.array_equal, before, after)):
        return
    np.testing.assert_allclose(
        outputs(folded, after, batch_of(config)),
        outputs(config, before, batch_of(config)),
        atol=1e-5,
    )
