"""Flax's files of weights: its numbers under PyTorch's names, as views, or a ValueError."""

from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest

from coda_jax.checkpoints.msgpack_files import MAX_ENTRIES, read_tensors, torch_name

KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)
TREE = {
    "shared": {"embedding": KERNEL.astype(np.float16)},
    "block": {
        "0": {"q": {"kernel": KERNEL, "bias": KERNEL[0]}, "layer_norm": {"weight": KERNEL[1]}}
    },
    "norm": {"scale": np.ones(3, ml_dtypes.bfloat16)},
    "conv": {"kernel": np.ones((2, 3, 4), np.float32)},
}
GOOD = serialization.to_bytes(TREE)
CHANGES = st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=3)


@pytest.fixture(name="read", scope="module")
def fixture_read(tmp_path_factory):
    """Returns a function that reads bytes as a file."""
    file = tmp_path_factory.mktemp("msgpack") / "flax_model.msgpack"

    def read(data):
        file.unlink(missing_ok=True)  # what was mapped from it stays
        file.write_bytes(data)
        return read_tensors(file)

    return read


def test_arrays_have_the_names_and_axes_of_pytorch(read):
    tensors = read(GOOD)
    expected = {
        "shared.weight": KERNEL.astype(np.float16),
        "block.0.q.weight": KERNEL.T,
        "block.0.q.bias": KERNEL[0],
        "block.0.layer_norm.weight": KERNEL[1],
        "norm.weight": np.ones(3, ml_dtypes.bfloat16),
        "conv.weight": np.ones((2, 3, 4), np.float32),
    }
    assert tensors.keys() == expected.keys()
    for name, leaf in tensors.items():
        assert leaf.dtype == expected[name].dtype
        np.testing.assert_array_equal(leaf, expected[name])
    assert torch_name("block/0/q/kernel") == "block.0.q.weight"


def test_arrays_are_views_of_the_file_that_jax_takes(read):
    tensors = read(GOOD)
    for leaf in tensors.values():
        assert not leaf.flags.writeable
        np.testing.assert_array_equal(jnp.asarray(leaf), leaf)  # wherever its bytes begin
        while isinstance(leaf.base, np.ndarray):
            leaf = leaf.base
        assert isinstance(leaf, np.memmap)


@pytest.mark.parametrize("size", [8, 12, 20])
def test_arrays_in_chunks_are_joined(read, monkeypatch, size):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", size)
    chunked = serialization.to_bytes(TREE)
    assert b"__msgpack_chunked_array__" in chunked
    expected = read(GOOD)
    tensors = read(chunked)
    assert not any(leaf.flags.writeable for leaf in tensors.values())
    assert tensors.keys() == expected.keys()
    for name, leaf in tensors.items():
        assert leaf.dtype == expected[name].dtype
        np.testing.assert_array_equal(leaf, expected[name])


def packed(value):
    return msgpack.packb(value, use_bin_type=True)


def array(shape=(3,), dtype="float32", data=bytes(12), kind=1):
    return msgpack.ExtType(kind, packed((shape, dtype, data)))


def nested(depth):
    return b"\x81\xa1x" * depth + packed(array())


def chunked(**changes):
    good = {"shape": {"0": 1, "1": 3}, "chunks": {"0": array()}}
    return packed({"x": {"__msgpack_chunked_array__": True, **good, **changes}})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (packed({"x": array(dtype="int32")}), "array of int32"),
        (packed({"x": array(dtype="float64")}), "array of float64"),
        (packed({"x": array(dtype="object")}), "array of object"),
        (packed({"x": array(shape=(4,))}), r"shape \[4\] has 12 bytes"),
        (packed({"x": array(shape=(2**31, 2**31))}), "has 12 bytes"),
        (
            packed({"x": array(shape=(2**62,))}),
            "the number 4,611,686,.* is larger than 4,294,967,296",
        ),
        (packed({"x": array(shape=(0, 3), data=b"")}), "has 0 bytes"),
        (packed({"x": array(shape=(-3,))}), "byte 0xfd"),
        (packed({"x": array(shape=(3, *[1] * 8))}), "the list 9 at .* is larger than 8"),
        (packed({"x": array(kind=2)}), "extension of type 2"),
        (packed({"x": array(kind=3)}), "extension of type 3"),
        (packed({"x": msgpack.ExtType(1, packed((1, 2)))}), "extension of type 1"),
        (packed({"x": msgpack.ExtType(1, packed(((3,), "float32", bytes(12))) + b"\0")}), "bytes"),
        (packed({"x": 1}), "x is not an array"),
        (packed({"x": {"y": True}}), "x/y is not an array"),
        (packed({"x": [1]}), "'x' is a list"),
        (packed({"x": "y"}), "'x' is a text"),
        (packed({"x": b"y"}), "'x' is a bytes"),
        (packed({"x": 0.5}), "byte 0xcb"),
        (packed({"x": None}), "byte 0xc0"),
        (packed({1: array()}), "a number .* for a text"),
        (packed({"x" * 201: array()}), "the text 201 at .* is larger than 200"),
        (packed([array()]), "a list .* for a map"),
        (packed(array()), "an? extension .* for a map"),
        (packed({"x": array()}) + b"\0", "something follows"),
        (b"\x82" + 2 * (packed("x") + packed(array())), "'x' twice"),
        (packed({"x": {"kernel": array(), "weight": array()}}), "same name in PyTorch"),
        (packed({"x/y": array(), "x": {"y": array()}}), "two leaves"),
        (packed({"x": array()})[:-1], "too early"),
        (b"\xdf\xff\xff\xff\xff", "too early"),
        (b"\x81\xa1x\xdf\xff\xff\xff\xff" + packed("x") + packed(array()), "too early"),
        (b"\x81\xa1x\xc9\xff\xff\xff\xff\x01", "too early"),
        (b"\x81\xdb\xff\xff\xff\xff", "the text 4,294,967,295 at .* is larger"),
        (b"\x81\xa1x\xc7\x06\x01\x93\xdd\xff\xff\xff\xff", "the list 4,294,967,295 at"),
        (nested(10_000), "33 deep"),
        (packed({str(i): 1 for i in range(MAX_ENTRIES + 1)}), "more than 50,000 entries"),
        (chunked(shape={"0": 3}, chunks={}), "without its parts"),
        (chunked(shape={"1": 3}), "without its parts"),
        (chunked(shape=3), "without its parts"),
        (chunked(chunks={"0": 3}), "without its parts"),
        (chunked(chunks={"0": array(), "1": array(dtype="float16", data=bytes(6))}), "its parts"),
        (chunked(shape={"0": 4}), "reshape"),
        (chunked(shape={"0": 2**62, "1": 2**62}), "reshape"),
        (b"", "empty"),
        (b"\xff" * 50, "byte 0xff"),
    ],
)
def test_what_flax_does_not_write_is_refused(read, data, match):
    with pytest.raises(ValueError, match=rf"flax_model\.msgpack is not .*: .*{match}") as error:
        read(data)
    assert len(str(error.value)) < 1000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_tensors(tmp_path / "absent.msgpack")


@settings(max_examples=300)
@given(changes=CHANGES, in_chunks=st.booleans())
def test_whatever_a_file_holds_it_is_read_or_refused(read, changes, in_chunks):
    """The format has no check sums, so that a change may make another model."""
    data = bytearray(chunked() if in_chunks else GOOD)
    for place, byte in changes:
        data[place % len(data)] = byte
    try:
        tensors = read(data)
    except ValueError:
        return
    assert sum(leaf.copy().nbytes for leaf in tensors.values()) < len(data)


@settings(max_examples=100)
@given(keep=st.integers(0, len(GOOD) - 1))
def test_a_truncated_file_is_refused(read, keep):
    with pytest.raises(ValueError, match=r"flax_model\.msgpack"):
        read(GOOD[:keep])
