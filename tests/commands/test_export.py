"""Exported programs answer as `Predictor` does, and load.py as `coda predict`, without coda_jax."""

import dataclasses
import json
import pathlib
import subprocess
import sys

from helpers import as_with_bfloat16, config, random_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.commands import export as command
from coda_jax.commands.export import export
from coda_jax.commands.loading import LoadedModel
from coda_jax.commands.predict import predict
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.inference import Decoding, Predictor

CONFIG = config(coda={"reduction": 2.0}, vocab_size=384)
DECODING = Decoding(max_input_length=40, max_decode_length=4, num_beams=2, batch_size=4)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((jnp.float32, False), id="float32"),
        pytest.param((jnp.bfloat16, False), id="bfloat16", marks=pytest.mark.all),
        pytest.param((jnp.bfloat16, True), id="bfloat16_in_products", marks=pytest.mark.all),
    ],
)
def model(request):
    """A model, on a CPU without or with products of bfloat16, whichever this one is."""
    dtype, products = request.param
    params = random_params(CONFIG)
    kernel = np.array(params["decoder"]["logits_dense"]["kernel"])
    kernel[:, [*range(100), *range(126, 384)]] *= 0.01  # so that it writes letters
    params["decoder"]["logits_dense"]["kernel"] = kernel * 3
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    jax.clear_caches()  # programs that were traced for the other
    with as_with_bfloat16(products):
        yield LoadedModel(CONFIG.replace(dtype=dtype), params, None)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "new"
    export(model, str(directory), DECODING, vocabulary="bytes")
    return directory


WITHOUT_CODA_JAX = """
import runpy, sys
sys.modules["coda_jax"] = None  # an import of it is an error
sys.path.insert(0, sys.argv[1])  # as `python load.py` does
runpy.run_path(f"{sys.argv[1]}/load.py", run_name="__main__")
assert not {"flax", "tensorflow"} & {name.split(".")[0] for name in sys.modules}
"""


def test_load_py_prints_the_lines_of_coda_predict_without_coda_jax(model, folder, tmp_path):
    """Of lines in several batches, one of which is cut, and one has other programs."""
    lines = ["a" * 34, "Grüße, " * 8, "", "b\rc" * 11, "short"]
    (tmp_path / "in.txt").write_bytes("\n".join(lines).encode())
    predict(model, str(tmp_path / "in.txt"), str(tmp_path / "out.jsonl"), DECODING, "bytes")
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_CODA_JAX, folder],
        input=(tmp_path / "in.txt").read_bytes(),
        stdout=subprocess.PIPE,
        check=True,
    )
    assert found.stdout == (tmp_path / "out.jsonl").read_bytes()
    assert len({json.loads(line)["prediction"] for line in found.stdout.splitlines()}) > 2


def test_rows_that_fill_up_a_batch_have_no_output(model, folder):
    manifest = json.loads((folder / command.MANIFEST_NAME).read_text())
    leaves = trees.flatten(model.params)
    weights = [leaves[path] for path in manifest["weights"]]
    program = jax.export.deserialize((folder / "predict_4x32.jax_export").read_bytes())
    inputs = np.zeros((4, 32), np.int32)
    inputs[2, :7] = 5
    tokens = np.asarray(program.call(weights, inputs))
    (expected,) = dict(Predictor(model.config, model.params, DECODING)([inputs[2, :7]])).values()
    np.testing.assert_array_equal(tokens[2], expected)
    assert expected.any() and not np.delete(tokens, 2, axis=0).any()


def test_the_manifest_lists_a_program_for_each_bucket(model, folder):
    manifest = json.loads((folder / command.MANIFEST_NAME).read_text())
    assert manifest["programs"] == {
        "predict_4x32.jax_export": [4, 32],
        "predict_4x40.jax_export": [4, 40],
    }
    assert set(map(pathlib.Path, manifest["programs"])) < {
        path.relative_to(folder) for path in folder.iterdir()
    }
    assert set(manifest["weights"].values()) == {jnp.dtype(model.config.dtype).name}
    assert (manifest["vocabulary"], manifest["fill"]) == ({"eos_id": 1}, 0)
    assert manifest["decoding"]["max_decode_length"] == 4 and manifest["platforms"] == ["cpu"]
    assert (manifest["arguments"], manifest["results"]) == (["weights", "inputs"], ["tokens"])


def test_a_program_has_no_answer_where_a_logit_is_not_finite(model, folder):
    manifest = json.loads((folder / command.MANIFEST_NAME).read_text())
    program = jax.export.deserialize((folder / "predict_4x32.jax_export").read_bytes())
    flat = trees.flatten(model.params)
    embedding = flat["token_embedder/embedding"]
    broken = flat | {"token_embedder/embedding": embedding.at[19].set(jnp.nan)}
    inputs = np.full((4, 32), 3, np.int32)
    inputs[2, 5] = 19
    expected, found = (
        np.array(program.call([leaves[path] for path in manifest["weights"]], inputs))
        for leaves in (flat, broken)
    )
    assert (found[2] == manifest["not_finite"]["tokens"]).all()
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(expected, 2, 0))


def test_without_a_vocabulary_there_is_no_load_py_which_is_said(model, tmp_path, capsys):
    decoding = dataclasses.replace(DECODING, max_input_length=8, num_beams=1)
    export(model, str(tmp_path), decoding)
    assert "there is no load.py in the folder, as there is no vocabulary" in capsys.readouterr().err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"manifest.json", "weights.npz", "predict_4x8.jax_export"}


def test_bad_requests_are_refused(model, folder, tmp_path):
    with pytest.raises(FileExistsError, match="is not empty"):
        export(model, str(folder), DECODING)
    with pytest.raises(ValueError, match=r"BATCH_SIZES\[1\] must be .* at least 1, got 0"):
        export(model, str(tmp_path), DECODING, batch_sizes=[2, 0])
    with pytest.raises(ValueError, match=r"PLATFORMS\[0\] must be one of .* got 'gpu'"):
        export(model, str(tmp_path), DECODING, platforms=["gpu"])


@pytest.mark.all
def test_drawn_outputs_are_those_of_the_predictor(tmp_path, rng):
    """A program takes the seed and the inputs' numbers, and follows stop texts."""
    cfg = CONFIG.replace(vocab_size=384)
    model = LoadedModel(cfg, random_params(cfg), None)
    options = {"do_sample": True, "num_return_sequences": 2, "seed": 7, "stop_strings": ["\n", "b"]}
    decoding = Decoding(max_input_length=32, max_decode_length=4, batch_size=2, **options)
    export(model, str(tmp_path), decoding, vocabulary="bytes")
    manifest = json.loads((tmp_path / command.MANIFEST_NAME).read_text())
    assert manifest["arguments"] == ["weights", "inputs", "seed", "numbers"]
    assert manifest["results"] == ["tokens", "scores"]
    assert manifest["decoding"].items() >= options.items()
    inputs = rng.integers(2, 20, (4, 32)).astype(np.int32)
    (name,) = manifest["programs"]
    program = jax.export.deserialize((tmp_path / name).read_bytes())
    _, merged = methods.merge(cfg, model.params)
    weights = [leaf for _, leaf in trees.flatten(merged).items()]
    numbers = np.array([3, 1], np.uint32)
    tokens, scores = program.call(weights, inputs[numbers], np.uint32(7), numbers)
    predictor = Predictor(cfg, model.params, decoding, ByteVocabulary())
    for index, expected, expected_scores in predictor.candidates(list(inputs)):
        for row in np.flatnonzero(numbers == index):
            np.testing.assert_array_equal(tokens[row], expected)
            np.testing.assert_allclose(scores[row], expected_scores, rtol=1e-5)
    others, _ = program.call(weights, inputs[numbers], np.uint32(8), numbers)
    assert (np.asarray(others) != tokens).any()
