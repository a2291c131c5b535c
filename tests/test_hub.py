"""Names of the Hugging Face Hub: found in its tools' cache, never fetched."""

import fnmatch
import os
import pathlib
import shlex
import shutil

from helpers import GOLDEN, assert_same_tree, unpack
import pytest

from coda_jax import bundled, hub
from coda_jax.checkpoints import load_hf
from coda_jax.commands.check import check
from coda_jax.commands.convert import convert
from coda_jax.commands.loading import load_model
from coda_jax.data.vocabularies import load_vocabulary

NAME = "google/t5-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = [  # the files of a model that has every format
    *["README.md", "config.json", "generation_config.json", "special_tokens_map.json"],
    *["spiece.model", "tokenizer.json", "tokenizer_config.json", "tf_model.h5", "onnx/model.onnx"],
    *["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
    *["model-00002-of-00002.safetensors", "flax_model.msgpack", "flax_model.msgpack.index.json"],
    *["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
]


@pytest.fixture(name="download")
def fixture_download(tmp_path, monkeypatch):
    """Returns a function that puts files into the cache as the Hub's tools do."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def download(*files, name=NAME, cache=tmp_path / ".cache/huggingface/hub"):
        model = cache / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / COMMIT
        for folder in (snapshot, model / "refs", model / "blobs"):
            folder.mkdir(parents=True, exist_ok=True)
        (model / "refs" / "main").write_text(COMMIT)
        for file in files:
            blob = model / "blobs" / f"blob of {file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        return snapshot

    return download


def golden_files(folder=GOLDEN / "v1_1"):
    return [folder / "config.json", folder / "model.safetensors"]


def test_a_model_in_the_cache_is_loaded_by_its_name(download):
    snapshot = download(*golden_files())
    assert hub.find(NAME) == snapshot
    config, params = load_hf(NAME)
    expected_config, expected = load_hf(GOLDEN / "v1_1")
    assert config == expected_config
    assert_same_tree(params, expected)


def test_commands_take_a_name_for_a_checkpoint_and_its_vocabulary(download, capsys):
    spiece = bundled.VOCABULARY / "spiece.model"
    snapshot = download(*golden_files(), spiece)
    assert load_model(NAME).directory == snapshot
    assert load_vocabulary(NAME).file == str(snapshot / "spiece.model")
    assert check(NAME)["parameters"] > 0
    convert(NAME, "converted", "hf")
    assert pathlib.Path("converted", "spiece.model").read_bytes() == spiece.read_bytes()
    assert_same_tree(load_hf("./converted")[1], load_hf(NAME)[1])


@pytest.mark.parametrize(
    ("variable", "value", "cache"),
    [
        ("HF_HUB_CACHE", "there", "there"),
        ("HF_HUB_CACHE", "$HOME/there", "there"),
        ("HUGGINGFACE_HUB_CACHE", "there", "there"),
        ("HF_HOME", "~/home", "home/hub"),
        ("XDG_CACHE_HOME", "home", "home/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_tools_have_it(
    download, tmp_path, monkeypatch, variable, value, cache
):
    snapshot = download(*golden_files(), cache=tmp_path / cache)
    assert hub.snapshot(NAME) is None
    monkeypatch.setenv(variable, value)
    assert hub.find(NAME).resolve() == snapshot.resolve()


@pytest.mark.parametrize(
    "path",
    ["./google/t5-tiny", "/google/t5-tiny", "a/b/c", "..", "../t5", "gs://t5", "", "a b/c", "t5/"],
)
def test_a_path_is_not_taken_for_a_name(download, path):
    download(*golden_files())
    assert hub.find(path) == pathlib.Path(path)
    assert hub.snapshot(path) is None


def test_a_folder_goes_before_a_name(download, tmp_path):
    download(*golden_files())
    (tmp_path / NAME).mkdir(parents=True)
    assert hub.find(NAME) == pathlib.Path(NAME)
    with pytest.raises(FileNotFoundError, match=r"google/t5-tiny/config\.json does not exist"):
        load_hf(NAME)


def test_a_name_without_an_owner_is_one(download):
    snapshot = download(*golden_files(), name="t5-tiny")
    assert hub.find("t5-tiny") == snapshot


def test_what_is_not_in_the_cache_says_how_to_get_exactly_what_is_needed(download, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_hf(NAME)
    first, command, last = str(error.value).splitlines()
    assert f"no folder {NAME}" in first and str(tmp_path / ".cache/huggingface/hub") in first
    *start, name = (words := shlex.split(command))[:3]
    assert (start, name) == (["hf", "download"], NAME)
    assert downloaded(words[3:]) == {
        *["config.json", "generation_config.json", "special_tokens_map.json", "spiece.model"],
        *["tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"],
        *["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    }
    flax, _, torch = shlex.split(last.rstrip("."))[-3:]
    assert downloaded([flax]) == {"flax_model.msgpack", "flax_model.msgpack.index.json"}
    assert downloaded([torch]) == {name for name in REPOSITORY if name.startswith("pytorch_model")}


def downloaded(patterns):
    """The files that `hf download` takes for these patterns."""
    return {file for file in REPOSITORY if any(fnmatch.fnmatch(file, p) for p in patterns)}


@pytest.mark.parametrize("files", [[], golden_files()[:1], golden_files()[1:]], ids=len)
def test_a_model_that_is_not_complete_is_not_there(download, files):
    download(*files)
    with pytest.raises(FileNotFoundError, match=f"hf download {NAME}"):
        hub.find(NAME)


def test_a_file_that_was_deleted_is_not_there(download):
    snapshot = download(*golden_files())
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(FileNotFoundError, match=f"hf download {NAME}"):
        load_model(NAME)


def test_all_shards_must_be_there(download, tmp_path):
    files = sorted((unpack("weights/files", tmp_path / "golden") / "bin_shards").iterdir())
    assert files[1].name == "pytorch_model-00001-of-00002.bin"
    download(files[0], *files[2:])
    with pytest.raises(FileNotFoundError, match=f"hf download {NAME}"):
        load_hf(NAME)
    download(files[1])
    assert load_hf(NAME)[1]


def test_the_tools_of_the_hub_find_the_same(download):
    tools = pytest.importorskip("huggingface_hub")
    snapshot = download(*golden_files())
    found = tools.snapshot_download(NAME, cache_dir=hub.cache(), local_files_only=True)
    assert found == str(hub.snapshot(NAME)) == str(snapshot)
