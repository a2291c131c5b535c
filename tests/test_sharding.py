"""Where arrays live: the tests' host has two devices, see conftest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.sharding import Placement

ROWS = {"tokens": np.arange(8).reshape(4, 2), "weights": np.ones(4, np.float32)}


def shards(array):
    """{device: its part of an array}."""
    return {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}


def test_parameters_are_whole_on_every_device():
    placed = Placement().params({"a": {"b": jnp.arange(3.0)}, "c": np.float32(2)})
    found = shards(placed["a"]["b"])
    assert found.keys() == set(jax.local_devices()) and len(found) == 2
    for values in found.values():
        np.testing.assert_array_equal(values, [0, 1, 2])
    assert placed["c"].shape == ()


def test_placed_parameters_are_copies():
    """A step may reuse their buffers."""
    placement = Placement()
    first = placement.params({"a": jnp.arange(3.0)})
    second = placement.params(first)
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
    placed = Placement(devices).batch(ROWS)
    assert shards(placed["tokens"]).keys() == set(devices)


def test_rows_that_devices_cannot_share_are_refused():
    three = {name: values[:3] for name, values in ROWS.items()}
    with pytest.raises(
        ValueError, match="the rows of a batch must be a multiple of 2 devices, got 3"
    ):
        Placement().batch(three)
    assert Placement(jax.local_devices()[:1]).batch(three)["tokens"].shape == (3, 2)
