"""Where arrays live: the tests' host has two devices, see conftest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coda_jax.models import FAMILIES, check_divides, placed
from coda_jax.sharding import Placement

ROWS = {"tokens": np.arange(8).reshape(4, 2), "weights": np.ones(4, np.float32)}


def shards(array):
    """{device: its part of an array}."""
    return {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}


def test_parameters_are_whole_on_every_device():
    placed = Placement().params({"a": {"b": jnp.arange(3.0)}, "c": np.float32(2)}, {})
    found = shards(placed["a"]["b"])
    assert found.keys() == set(jax.local_devices()) and len(found) == 2
    for values in found.values():
        np.testing.assert_array_equal(values, [0, 1, 2])
    assert placed["c"].shape == ()


def test_placed_parameters_are_copies():
    """A step may reuse their buffers."""
    placement = Placement()
    first = placement.params({"a": jnp.arange(3.0)}, {})
    second = placement.params(first, {})
    second["a"].delete()
    np.testing.assert_array_equal(first["a"], [0, 1, 2])


def test_the_rows_of_a_batch_are_shared_out_in_order():
    placed = Placement().batch(ROWS)
    first, second = (shards(placed["tokens"])[device] for device in jax.local_devices())
    np.testing.assert_array_equal(np.concatenate([first, second]), ROWS["tokens"])
    assert first.shape == second.shape == (2, 2)
    assert {values.shape for values in shards(placed["weights"]).values()} == {(2,)}


def test_devices_can_be_chosen():
    devices = jax.local_devices()[1:]
    placed = Placement(devices=devices).batch(ROWS)
    assert shards(placed["tokens"]).keys() == set(devices)


def test_rows_that_devices_cannot_share_are_refused():
    three = {name: values[:3] for name, values in ROWS.items()}
    with pytest.raises(
        ValueError,
        match="the rows of a batch must be a multiple of the 2 devices along 'data' of the MESH, "
        "got 3",
    ):
        Placement().batch(three)
    one = Placement(devices=jax.local_devices()[:1])
    assert one.batch(three)["tokens"].shape == (3, 2)


def test_parameters_are_divided_by_the_names_of_their_axes():
    axes = {"wi/kernel": ("embed", "mlp"), "embedding": ("vocab", "embed"), "scale": ("embed",)}
    tree = {"wi": {"kernel": np.ones((3, 4))}, "embedding": np.ones((8, 3)), "scale": np.ones(4)}
    placed = Placement({"model": 2}).params({"decoder": tree, "other": np.ones(4)}, axes)
    held = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, placed)
    assert held == {
        "decoder": {"wi": {"kernel": (3, 2)}, "embedding": (4, 3), "scale": (4,)},
        "other": (4,),
    }
    np.testing.assert_array_equal(placed["decoder"]["embedding"], np.ones((8, 3)))


def test_what_does_not_divide_is_whole():
    """Such as three labels; and what Adafactor keeps of a matrix has other axes than the matrix."""
    axes = {"head/kernel": ("embed", "vocab"), "head/bias": ("vocab",)}
    head = {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}
    state = optax.scale_by_factored_rms(min_dim_size_to_factor=2).init({"head": head})
    for leaf in jax.tree.leaves(Placement({"model": 2}).shapes((head, state), axes)):
        assert leaf.sharding.is_fully_replicated


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["num_heads", "mlp_dim"])
def test_heads_and_channels_that_devices_cannot_share_are_named(family, name):
    config = FAMILIES[family].tiny.replace(**{name: 3})
    check_divides(config, Placement())
    message = (
        rf"Config\.{name} must be a multiple of the 2 devices along 'model' of the MESH, got 3"
    )
    with pytest.raises(ValueError, match=message):
        placed(config, {}, Placement({"model": 2}))
