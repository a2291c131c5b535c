"""PyTorch's files of weights: its numbers, as views, and nothing run, whatever a file says."""

import itertools
import os
import pickle
import struct
import zipfile

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest
from torch_format import (
    ORDERED_DICT,
    legacy,
    named,
    number,
    several,
    state_dict,
    tensor,
    text,
    zipped,
)

from coda_jax.checkpoints.torch_files import MAX_PICKLE, read_tensors

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)
BYTES = {"0": VALUES.tobytes(), "1": np.ones(3, ml_dtypes.bfloat16).tobytes()}
TENSORS = {
    "plain": tensor("0", (2, 3)),
    "turned": tensor("0", (3, 2), stride=(1, 3), numel=6),
    "part": tensor("0", (2,), offset=2, stride=(3,), numel=6),
    "half": tensor("1", (3,), kind="BFloat16Storage"),
}
GOOD = zipped(state_dict(TENSORS), BYTES, byteorder="little", version="3\n")
OLD = {name: tensor("0", (2, 3), legacy=True) for name in ("plain", "tied")}
LEGACY = legacy(state_dict(OLD), {"0": BYTES["0"]})
CHANGES = st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=3)


@pytest.fixture(name="scratch", scope="module")
def fixture_scratch(tmp_path_factory):
    """One folder for all examples."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(name="read")
def fixture_read(tmp_path):
    """Returns a function that reads bytes as a file."""

    def read(data):
        (tmp_path / "pytorch_model.bin").write_bytes(data)
        return read_tensors(tmp_path / "pytorch_model.bin")

    return read


def assert_good(tensors):
    assert tensors.keys() == TENSORS.keys()
    np.testing.assert_array_equal(tensors["plain"], VALUES)
    np.testing.assert_array_equal(tensors["turned"], VALUES.T)
    np.testing.assert_array_equal(tensors["part"], [2, 5])
    np.testing.assert_array_equal(tensors["half"], np.ones(3))
    assert tensors["half"].dtype == ml_dtypes.bfloat16


def test_tensors_are_views_of_the_file(read):
    tensors = read(GOOD)
    assert_good(tensors)
    assert np.shares_memory(tensors["plain"], tensors["turned"])
    for leaf in tensors.values():
        assert not leaf.flags.writeable
        while isinstance(leaf.base, np.ndarray):
            leaf = leaf.base
        assert isinstance(leaf, np.memmap)


def test_a_legacy_file_is_read_too(read):
    tensors = read(LEGACY)
    for name in OLD:
        np.testing.assert_array_equal(tensors[name], VALUES)
    assert np.shares_memory(tensors["plain"], tensors["tied"])


def test_versions_of_modules_are_accepted_and_dropped(read):
    metadata = b"}" + text("_metadata") + b"}" + text("") + b"}" + text("version") + number(1)
    pickled = state_dict(TENSORS)[:-1] + metadata + b"sssb."
    assert_good(read(zipped(pickled, BYTES)))


def test_parameters_and_float64_are_read(read):
    """As of a state dict with keep_vars, or of named_parameters."""
    data = tensor("0", (3,), kind="DoubleStorage")
    parameter = named("torch._utils", "_rebuild_parameter") + several(data, b"\x88", ORDERED_DICT)
    tensors = read(zipped(state_dict({"x": parameter + b"R"}), {"0": BYTES["0"]}))
    assert tensors["x"].dtype == np.float64
    np.testing.assert_array_equal(tensors["x"], np.frombuffer(BYTES["0"]))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_newer_protocols_are_read(read, protocol):
    """Their opcodes for what is in a state dict, and nothing else of them."""

    def short(value):
        return b"\x8c" + bytes([len(value)]) + value.encode() + b"\x94"

    pickled = state_dict(TENSORS)[2:]
    if protocol > 3:
        pickled = b"\x95" + struct.pack("<Q", len(pickled)) + pickled
        for module, name in (("collections", "OrderedDict"), ("torch", "FloatStorage")):
            pickled = pickled.replace(named(module, name), short(module) + short(name) + b"\x93")
    assert_good(read(zipped(b"\x80" + bytes([protocol]) + pickled, BYTES)))


def test_files_of_torch_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    weights = {
        f"{dtype}_{rank}": torch.randn((3, 4, 5)[:rank]).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        for rank in range(4)
    }
    weights["turned"] = torch.randn(3, 4, 5)[1:].permute(2, 0, 1)
    weights["tied"] = weights["turned"]
    weights["parameter"] = torch.nn.Parameter(torch.ones(2))
    for new, protocol in itertools.product((True, False), (2, 3, 4, 5)):
        options = {"_use_new_zipfile_serialization": new, "pickle_protocol": protocol}
        torch.save(weights, tmp_path / "x.bin", **options)
        tensors = read_tensors(tmp_path / "x.bin")
        assert tensors.keys() == weights.keys()
        for name, leaf in tensors.items():
            assert str(weights[name].dtype) == f"torch.{leaf.dtype}"
            expected = weights[name].detach().float().numpy()
            np.testing.assert_array_equal(leaf.astype(np.float32), expected)


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def in_both_formats(pickled):
    head = LEGACY[: LEGACY.index(state_dict(OLD))]
    return zipped(pickled, BYTES), head + pickled


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, exec, getattr, pickle.loads])
def test_a_pickle_that_calls_something_is_refused_by_name_and_leaves_no_trace(
    read, tmp_path, function, protocol
):
    marker = tmp_path / "marker"
    argument = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    pickled = pickle.dumps({"weight": Call(function, argument)}, protocol)
    names = rf"names \w+\.{function.__name__}"
    match = names if protocol >= 2 else rf"({names}|opcode \w+)"
    for data in in_both_formats(pickled):
        with pytest.raises(ValueError, match=f"{match}; nothing of it was run"):
            read(data)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("opcodes", "match"),
    [
        (named("numpy", "ndarray"), r"names numpy\.ndarray; nothing"),
        (named("torch", "LongStorage"), r"names torch\.LongStorage"),
        (named("torch._utils", "_rebuild_qtensor"), r"names torch\._utils\._rebuild_qtensor"),
        (named("collections", "OrderedDict.fromkeys"), r"names collections\.OrderedDict\.fromkeys"),
        (b"(" + text("x") + b"iposix\nsystem\n", "opcode INST 'posix system'"),
        (b"\x82\x01", "opcode EXT1"),
        (ORDERED_DICT + b"}" + text("__class__") + number(1) + b"sb", "sets attributes"),
        (ORDERED_DICT + several() + b"R", "another way than torch.save"),
        (named("torch", "FloatStorage") + several(number(9)) + b"R", "another way"),
        (text("x") + several() + b"R", "another way"),
        (text("x") + b"Q", "no storage"),
        (several(text("module"), text("x")) + b"Q", "no storage"),
        (b"}" + number(1) + number(2) + b"s", "a int for a str"),
        (b"}" + (text("x") + number(2) + b"s") * 2, "holds 'x' twice"),
        (b"](" + b"u", "a list for a dict"),
        (b"}(" + b"e", "a dict for a list"),
        (b"h\x07", "7"),
        (b"]" + number(1) + b"a" + b"a", "list"),
        (number(1) + text("system") + b"\x93", "a int for a str"),
        (text("posix") + text("system") + b"\x93", r"names posix\.system; nothing"),
        (named("torch._utils", "_rebuild_parameter") + several(number(1)) + b"R", "another way"),
        (b"0", "opcode POP"),
        (b"\xff", "unknown"),
    ],
)
def test_what_torch_save_does_not_write_is_refused(read, opcodes, match):
    for pickled in (b"\x80\x02" + opcodes + b".", state_dict({"x": opcodes})):
        for data in in_both_formats(pickled):
            with pytest.raises(ValueError, match=rf"(?s)pytorch_model\.bin is not .*: .*{match}"):
                read(data)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"offset": 1}, "not within its 6 elements: offset 1"),
        ({"offset": -1}, "not within"),
        ({"offset": 2**70}, "not within"),
        ({"size": (7,)}, "not within"),
        ({"size": (2, 3), "stride": (4, 1)}, "not within"),
        ({"size": (-2, -3)}, "not within"),
        ({"size": (0, 2**62), "stride": (1, 1)}, "not within"),
        ({"size": (2, 3), "stride": (-3, 1), "offset": 3}, "not within"),
        ({"size": (2**40,), "stride": (0,)}, "not within"),
        ({"size": (2**32, 2**32), "stride": (1, 1)}, "not within"),
        ({"size": (6,), "stride": ()}, "1 sizes and 0 strides"),
        ({"size": (1,) * 9}, "9 sizes and 9 strides"),
        ({"numel": 7}, "24 bytes, not 7 x 4"),
        ({"numel": 2**60}, "24 bytes, not 1152921504606846976 x 4"),
        ({"numel": -6}, "24 bytes, not -6 x 4"),
        ({"kind": "HalfStorage"}, "24 bytes, not 6 x 2"),
        ({"key": "7"}, "0 bytes, not 6 x 4"),
        ({"key": "../data.pkl"}, "0 bytes"),
    ],
)
def test_a_tensor_that_is_not_within_its_storage_is_refused(read, changes, match):
    changes = {"key": "0", "size": (6,), "numel": 6, **changes}
    with pytest.raises(ValueError, match=f"'weight'.*{match}"):
        read(zipped(state_dict({"weight": tensor(**changes)}), BYTES))


def test_sizes_are_numbers(read):
    wrong = tensor("0", (6,)).replace(several(number(6)), several(text("6")))
    with pytest.raises(ValueError, match="1 sizes"):
        read(zipped(state_dict({"weight": wrong}), BYTES))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (zipped(state_dict(TENSORS), BYTES, compression=zipfile.ZIP_DEFLATED), "compressed"),
        (zipped(state_dict(TENSORS), BYTES, byteorder="big"), "little-endian"),
        (GOOD.replace(b"data.pkl", b"data.xyz"), "0 entries data.pkl"),
        (GOOD.replace(b"model/data/1", b"model/data/0"), "the same name"),
        (GOOD.replace(b"plain", b"plane"), "pickle is damaged"),
        (GOOD.replace(BYTES["0"], BYTES["0"][::-1]), "storage '0' is damaged: the CRC-32 differs"),
        (GOOD[:-1], "zip"),
        (GOOD.replace(b"PK\x03\x04", b"PK\x03\x05", 3).replace(b"PK\x03\x05", b"PK\x03\x04", 1),
         "not where its directory says"),
        (zipped(b"N" * MAX_PICKLE + b".", BYTES), f"more than {MAX_PICKLE} bytes"),
        (zipped(state_dict({"x": number(3)}), BYTES), "'x' is not a tensor"),
        (zipped(b"\x80\x02].", BYTES), "holds a list, not a dict"),
        (LEGACY.replace(b"\x88s", b"\x89s"), "little-endian"),
        (LEGACY.replace(number(1001), number(1002)), "does not start as one"),
        (LEGACY[:-1], "23 bytes, not 6 x 4"),
        (LEGACY.replace(struct.pack("<q", 6), struct.pack("<q", -6)), "-6 elements, not 6"),
        (b"", "pytorch_model.bin"),
        (b"\x00" * 100, "unknown"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pytorch_model.bin"),
    ],
)  # fmt: skip
def test_a_file_that_is_damaged_or_another_is_refused(read, data, match):
    with pytest.raises(ValueError, match=match) as error:
        read(data)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "keys",
    [
        b"](" + b")" + b"\x85" * 1000 + b"e",  # a tuple in a tuple, 1,000 deep
        b"](" + b")" + b"q\x01h\x01\x86" * 16 + b"e",  # each holds the one before twice
        b"](" + text("x" * 5000) + b"e",
        text("0"),
    ],
    ids=["deep", "doubled", "long", "no list"],
)
def test_a_legacy_list_of_storages_holds_the_keys_of_tensors_only(read, keys):
    """Others are not even hashed or shown, which could take all memory or time."""
    old = b"\x80\x02]" + text("0") + b"a."
    assert LEGACY.count(old) == 1
    with pytest.raises(ValueError, match="list of storages is not that of its tensors") as error:
        read(LEGACY.replace(old, b"\x80\x02" + keys + b"."))
    assert len(str(error.value)) < 1000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_tensors(tmp_path / "absent.bin")


# Where a change makes other numbers, and nothing can tell.
VALUE_PLACES = {GOOD.index(data) + i for data in BYTES.values() for i in range(len(data))}


def outcome(folder, data):
    """The tensors in a file of these bytes; None where they are refused."""
    file = folder / "pytorch_model.bin"
    file.write_bytes(data)
    try:
        return {name: leaf.copy() for name, leaf in read_tensors(file).items()}
    except ValueError:
        return None


@settings(max_examples=300)
@given(place=st.integers(0, len(GOOD) - 1), bits=st.integers(1, 255))
def test_a_changed_byte_changes_no_number_in_silence(scratch, place, bits):
    data = bytearray(GOOD)
    data[place] ^= bits
    tensors = outcome(scratch, data)
    if tensors is not None and place not in VALUE_PLACES:
        assert_good(tensors)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in texts of another opcode
@settings(max_examples=200)
@given(data=st.data())
def test_whatever_a_file_holds_it_is_read_or_refused(scratch, data):
    """Where no check sum tells, as in a pickle, a change may make another model."""
    changed = bytearray(LEGACY)
    for place, byte in data.draw(CHANGES):
        changed[place % len(changed)] = byte
    outcome(scratch, changed)
    pickled = bytearray(state_dict(TENSORS))
    for place, byte in data.draw(CHANGES):
        pickled[place % len(pickled)] = byte
    outcome(scratch, zipped(bytes(pickled), BYTES))


@settings(max_examples=100)
@given(keep=st.integers(0, len(GOOD) - 1))
def test_a_truncated_file_is_refused(scratch, keep):
    assert outcome(scratch, GOOD[:keep]) is None
    assert outcome(scratch, LEGACY[: keep * len(LEGACY) // len(GOOD)]) is None
