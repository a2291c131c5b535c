"""Every parameter has axis names, and methods add to the base's leaves without changing them."""

from contract.table import each_case
from helpers import shapes

from coda_jax import methods, trees
from coda_jax.models import param_shapes

# What T5X's partitioning rules know.
AXIS_NAMES = {
    "embed", "mlp", "heads", "kv", "joined_kv", "vocab", "relpos_buckets", "length", "layers",
    "stack",
}  # fmt: skip


@each_case("parameters")
def test_every_parameter_has_axis_names_that_t5x_knows(case):
    """As many as axes, each at most once."""
    made = shapes(case.config)
    leaves, axes = trees.flatten(made["params"]), trees.flatten(made["params_axes"])
    assert axes.keys() == {f"{path}_axes" for path in leaves}
    for path, leaf in leaves.items():
        names = axes[f"{path}_axes"].names
        assert len(names) == len(leaf.shape) == len(set(names)) and set(names) <= AXIS_NAMES, path


@each_case("parameters")
def test_without_what_the_methods_create_the_tree_is_the_dense_models(case):
    """Methods take nothing away, and create only what their patterns say."""
    config = case.config
    new, dense = trees.split(param_shapes(config), methods.created(config))
    trees.check_tree(param_shapes(config.dense()), dense)
    found = methods.created(config)
    assert all(trees.matches(path, found) for path in trees.flatten(new))
    trained, frozen = methods.partition(config, param_shapes(config))
    assert trees.flatten(new).keys() <= trees.flatten(trained).keys()
    assert trees.count(trained) + trees.count(frozen) == trees.count(param_shapes(config))
