"""QUANTIZE='int8': what is loaded, trained, converted and exported with int8 weights."""

import itertools
import json
import runpy

from contract.programs import batch_of
from helpers import adapted_params, config, random_params
import numpy as np
import optax
import pytest

from coda_jax import checkpoints, methods, trees
from coda_jax.adapters import Adapters
from coda_jax.checkpoints.adapter import read_manifest
from coda_jax.commands.convert import convert
from coda_jax.commands.export import export
from coda_jax.commands.loading import load_model
from coda_jax.commands.many_adapters import with_adapters
from coda_jax.commands.model_card import CARD
from coda_jax.commands.train import load_teacher
from coda_jax.inference import Decoding, Predictor
from coda_jax.methods import Lora
from coda_jax.nn.quantized import INT8, quantization_of
from coda_jax.objectives import model_for
from coda_jax.sharding import Placement
from coda_jax.training.run_directory import RUN_FILE
from coda_jax.training.trainer import TrainOptions, train

SIZES = {"vocab_size": 384, "num_encoder_layers": 1, "num_decoder_layers": 1, "dropout_rate": 0.0}
CONFIG = config(**SIZES).replace(methods=(Lora(rank=2),))


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
    """A base in "base"; adapters of it, trained on floats in "float" and on int8 in "int8"."""
    folder = tmp_path_factory.mktemp("quantized")
    base = random_params(CONFIG.dense())
    checkpoints.save_hf(folder / "base", CONFIG.dense(), base)
    params = adapted_params(CONFIG, base, seed=1)
    checkpoints.save_adapter(folder / "float", CONFIG, params)
    checkpoints.save_adapter(folder / "int8", CONFIG, checkpoints.quantize(CONFIG, params))
    return folder


def load(folder, adapter=None, quantize=None, **options):
    """The base, with one of the adapters."""
    adapter = adapter and str(folder / adapter)
    base = str(folder / "base")
    return load_model(base, adapter_checkpoint=adapter, quantize=quantize, **options)


def test_an_adapter_of_int8_is_loaded_so_and_others_where_it_is_asked_for(folder):
    manifests = [read_manifest(folder / name) for name in ("float", "int8")]
    assert [manifest["quantization"] for manifest in manifests] == [None, INT8]
    assert manifests[0]["base"] == manifests[1]["base"]  # the checkpoint's own leaves
    for adapter, asked, expected in (
        ("int8", None, INT8),
        ("int8", INT8, INT8),
        ("float", None, None),
        ("float", INT8, INT8),
        (None, INT8, INT8),
    ):
        assert quantization_of(load(folder, adapter, asked).params) == expected
    with pytest.raises(ValueError, match=r"QUANTIZE must be one of \('int8',\), got 'int4'"):
        load(folder, quantize="int4")


def test_int8_weights_are_written_as_no_base(folder, tmp_path):
    params = load(folder, "int8").params
    _, base = trees.split(params, methods.created(CONFIG))
    with pytest.raises(ValueError, match="a Hugging Face checkpoint holds float weights, and th"):
        checkpoints.save_hf(tmp_path / "hf", CONFIG.dense(), base)
    with pytest.raises(ValueError, match="a T5X checkpoint holds float weights, and these are in"):
        checkpoints.save_t5x(tmp_path / "t5x", params)
    options = {"base": str(folder / "base")}
    with pytest.raises(ValueError, match=r"\['lora'\] cannot be merged into int8 weights"):
        convert(str(folder / "int8"), str(tmp_path / "merged"), "hf", **options)
    convert(str(folder / "int8"), str(tmp_path / "peft"), "peft", **options)
    convert(str(folder / "int8"), str(tmp_path / "adapter"), "adapter", **options)
    assert read_manifest(tmp_path / "adapter")["quantization"] == INT8
    assert "| frozen weights | int8 |" in (tmp_path / "adapter" / CARD).read_text()


@pytest.mark.all
def test_adapters_of_one_batch_share_an_int8_base(folder):
    named = {"a": str(folder / "int8")}
    model = with_adapters(load(folder), named)  # all were trained so
    adapters = Adapters(model.config.dense(), model.params, named, Placement())
    assert quantization_of(adapters.frozen) == INT8
    adapters.add("b", str(folder / "float"))
    assert adapters.names == ["a", "b"]
    mixed = with_adapters(load(folder), {**named, "b": str(folder / "float")})
    with pytest.raises(ValueError, match="'a' is on int8 weights, the base has float ones: QUA"):
        Adapters(mixed.config.dense(), mixed.params, mixed.adapters, Placement())


@pytest.mark.all
def test_an_exported_folder_answers_with_int8_weights(folder, tmp_path):
    model = load(folder, "int8")
    decoding = Decoding(max_input_length=4, max_decode_length=2, batch_size=2)
    export(model, str(tmp_path / "served"), decoding, vocabulary="bytes")
    served = runpy.run_path(str(tmp_path / "served" / "load.py"))["Served"](tmp_path / "served")
    kinds = served.manifest["weights"]
    assert {kind for path, kind in kinds.items() if path.endswith("kernel/values")} == {INT8}
    rows = [np.array([99, 100, 1], np.int32)] * 2
    predicted = dict(Predictor(model.config, model.params, decoding)(rows))
    np.testing.assert_array_equal(served(rows)[0], [predicted[0], predicted[1]])


@pytest.mark.all
def test_a_run_on_int8_goes_on_with_it_alone(folder, tmp_path):
    def run(model, steps):
        return train(
            model_for(model.config),
            model.params,
            itertools.repeat(batch_of(model.config)),
            options=TrainOptions(total_steps=steps),
            optimizer=optax.adam,
            learning_rate=1e-2,
            directory=tmp_path / "run",
            run={},
        )

    student = load(folder, quantize=INT8, methods=CONFIG.methods)
    params, _ = run(student, 2)
    assert quantization_of(params) == INT8
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text())["quantization"] == INT8
    with pytest.raises(ValueError, match="quantization: there 'int8', here None"):
        run(load(folder, methods=CONFIG.methods), 4)
    convert(str(tmp_path / "run"), str(tmp_path / "new"), "adapter", base=str(folder / "base"))
    assert read_manifest(tmp_path / "new")["quantization"] == INT8
    _, taught = load_teacher(student, None)  # the student's own arrays
    ours = trees.flatten(student.params)
    assert all(leaf is ours[path] for path, leaf in trees.flatten(taught).items())
