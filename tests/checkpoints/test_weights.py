"""Formats of weights: the same numbers from each, one of several, bounds for hostile files."""

import io
import json
import logging
import shutil
import struct
import subprocess
import sys
import zipfile

from helpers import GOLDEN, assert_same_tree, unpack
import jax
import pytest
from safetensors.numpy import load_file
from torch_format import of_arrays, state_dict, tensor, zipped

from coda_jax import hub
from coda_jax.checkpoints import load_hf, torch_files, weights

SAFETENSORS = "model.safetensors"
FOLDERS = {  # of the golden files, with what is read in each
    "safetensors": SAFETENSORS,
    "bin": "pytorch_model.bin",
    "bin_legacy": "pytorch_model.bin",
    "bin_float16": "pytorch_model.bin",
    "bin_bfloat16": "pytorch_model.bin",
    "bin_shards": "pytorch_model.bin.index.json",
    "flax": "flax_model.msgpack",
    "flax_bfloat16": "flax_model.msgpack",
    "flax_shards": "flax_model.msgpack.index.json",
}


@pytest.fixture(name="golden", scope="module")
def fixture_golden(tmp_path_factory):
    """The folders that PyTorch, Flax and transformers wrote."""
    return unpack("weights/files", tmp_path_factory.mktemp("weights"))


@pytest.fixture(name="folder")
def fixture_folder(golden, tmp_path):
    """Returns a function that copies golden folders into one."""

    def copy(*names):
        for name in names:
            shutil.copytree(golden / name, tmp_path / "copy", dirs_exist_ok=True)
        return tmp_path / "copy"

    return copy


@pytest.mark.parametrize("name", FOLDERS)
def test_each_format_has_the_numbers_of_safetensors(golden, name, caplog):
    caplog.set_level(logging.INFO)
    config, params = load_hf(golden / name)
    assert [record.message for record in caplog.records if record.name == weights.__name__] == [
        f"{golden / name}: reading {FOLDERS[name]}"
    ]
    expected_config, expected = load_hf(golden / "safetensors")
    assert config == expected_config
    dtype = {"float16": "float16", "bfloat16": "bfloat16"}.get(name.split("_")[-1], "float32")
    assert_same_tree(params, jax.tree.map(lambda leaf: leaf.astype(dtype), expected))


@pytest.mark.parametrize("name", ["v1_0", "mt5", "byt5", "pix2struct", "w2v_bert"])
def test_every_family_loads_from_a_file_of_pytorch(tmp_path, name):
    shutil.copy(GOLDEN / name / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(of_arrays(load_file(GOLDEN / name / SAFETENSORS)))
    config, params = load_hf(tmp_path)
    expected_config, expected = load_hf(GOLDEN / name)
    assert config == expected_config
    assert_same_tree(params, expected)


def test_of_several_formats_the_first_is_read_and_named(folder, caplog):
    several = folder("bin_bfloat16", "flax_shards", "safetensors")
    (several / "tf_model.h5").write_bytes(b"\x89HDF")
    _, params = load_hf(several)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    others = "flax_model.msgpack.index.json, pytorch_model.bin"
    assert said == f"{several}: reading model.safetensors, not {others}"
    (several / SAFETENSORS).unlink()
    caplog.clear()
    load_hf(several)
    assert "reading flax_model.msgpack.index.json, not pytorch_model.bin" in caplog.text


def test_a_folder_without_weights_says_what_was_looked_for(folder):
    empty = folder("safetensors")
    (empty / SAFETENSORS).unlink()
    names = [name for form in weights.FORMATS for name in (form.file, form.index)]
    with pytest.raises(FileNotFoundError) as error:
        load_hf(empty)
    assert str(error.value) == f"{empty} has none of {', '.join(names)}"
    for name in ("rust_model.ot", "tf_model.h5"):
        (empty / name).write_bytes(b"x")
    with pytest.raises(
        FileNotFoundError, match=r"; tf_model\.h5 and rust_model\.ot cannot be read"
    ):
        load_hf(empty)


@pytest.mark.parametrize("name", ["bin_shards", "flax_shards"])
def test_an_index_must_match_its_shards(folder, name):
    shards = folder(name)
    (file,) = shards.glob("*.index.json")
    index = json.loads(file.read_text())
    *_, last = index["weight_map"]
    shard = index["weight_map"].pop(last)
    file.write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=rf"{last.split('/')[0]}.* is in {shard}, the index says None"
    ):
        load_hf(shards)
    (shards / shard).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks shards that {file.name} names: .*{shard}"):
        load_hf(shards)


def test_one_shard_is_enough(folder):
    shards = folder("bin")
    (shards / "pytorch_model.bin").rename(shards / "pytorch_model-00001-of-00001.bin")
    names = torch_files.read_tensors(shards / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")}
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert load_hf(shards)[1]


def test_the_hub_knows_the_formats():
    assert [form.file for form in weights.FORMATS] == list(hub.WEIGHTS)


def bomb():
    """A small zip file whose pickle has 256 MB."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("model/data.pkl", "w") as file,
    ):
        for _ in range(256):
            file.write(bytes(MIB))
    return buffer.getvalue()


def crowd():
    """A zip file of 200,000 entries, of which only the directory is there."""
    data = zipped(b"", {})
    start, stop = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    size = 200_000 * (stop - start)
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 65535, 65535, size, start, 0)
    return data[:start] + data[start:stop] * 200_000 + end


def one_tensor(**changes):
    return zipped(state_dict({"x": tensor("0", **changes)}), {"0": bytes(24)})


def entry(number):
    """An empty map under a long name."""
    return b"\xd9\xc8" + b"%0200d" % number + b"\x80"


MIB = 2**20
START = b"\x80\x02"  # of a pickle
HOSTILE = {
    "a zip bomb.bin": bomb,
    "a zip of many entries.bin": crowd,
    "a storage of 2^60 bytes.bin": lambda: one_tensor(size=(2**58,)),
    "a tensor of 2^60 bytes.bin": lambda: one_tensor(size=(2**58,), stride=(0,), numel=6),
    "a memo of 2^31 places.bin": lambda: zipped(START + b"}r\xff\xff\xff\x7f0.", {}),
    "a text of 2^32 bytes.bin": lambda: zipped(START + b"X\xff\xff\xff\xffx.", {}),
    "a number of 2^31 bytes.bin": lambda: zipped(START + b"\x8b\xff\xff\xff\x7fx.", {}),
    "a pickle of dicts.bin": lambda: zipped(START + b"}" * (MIB - 3) + b".", {}),
    "tuples in tuples.bin": lambda: zipped(START + b")" + b"\x85" * (MIB - 4) + b".", {}),
    "a long pickle.bin": lambda: zipped(START + b"}" * 2 * MIB + b".", {}),
    "a long legacy pickle.bin": lambda: START + b"}" * 2 * MIB + b".",
    "a map of 2^32 entries.msgpack": lambda: b"\xdf\xff\xff\xff\xff",
    "a list of 2^32 numbers.msgpack": lambda: b"\x81\xa1x\xc7\x06\x01\x93\xdd\xff\xff\xff\xff",
    "an array of 2^32 bytes.msgpack": lambda: b"\x81\xa1x\xc9\xff\xff\xff\xff\x01",
    "maps in maps.msgpack": lambda: b"\x81\xa1x" * 100_000,
    "many maps.msgpack": lambda: b"\xdf\xff\xff\xff\xff" + b"".join(map(entry, range(60_000))),
}
ATTACK = """
import pathlib, re, resource, sys, time
from coda_jax.checkpoints import msgpack_files, torch_files

size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 256 * 2**20,) * 2)  # beyond it: MemoryError
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    read = (torch_files if path.suffix == ".bin" else msgpack_files).read_tensors
    start = time.process_time()
    try:
        read(path)
    except ValueError as error:
        assert len(str(error)) < 1000, path
    else:
        raise AssertionError(f"{path} was read")
    assert time.process_time() - start < 10, path
    print(f"{time.process_time() - start:5.2f} s  {path.stem}")
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="the memory of a process is limited as Linux does"
)
def test_hostile_files_are_refused_at_once_in_little_memory(tmp_path):
    for name, data in HOSTILE.items():
        (tmp_path / name).write_bytes(data())
    run = subprocess.run([sys.executable, "-c", ATTACK, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" s  ") == len(HOSTILE)


@pytest.mark.parametrize("name", ["config.json", *FOLDERS.values()])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(folder, name):
    """What a clone without Git LFS has in the place of large files."""
    copy = folder("safetensors")
    (copy / SAFETENSORS).unlink()
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.* run `git lfs pull`"):
        load_hf(copy)


def test_weights_that_are_named_for_their_dtype_are_found(folder):
    copy = folder("safetensors")
    (copy / SAFETENSORS).rename(copy / "model.fp16.safetensors")
    match = r"to read model\.fp16\.safetensors, rename it to model\.safetensors"
    with pytest.raises(FileNotFoundError, match=match):
        load_hf(copy)
