"""T5X's own programs with our gin files: train, resume, evaluate, infer, and its own tests.

Run with T5X's checkout on PYTHONPATH (`make test-t5x`); each program takes half a minute.
"""

import importlib
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import gin
import jax
import numpy as np
import pytest
import seqio
from t5x_programs import (
    FINETUNE_FILES,
    METHOD,
    OUR_GIN,
    SHARED,
    SIZES,
    VOCABULARY,
    finetune,
    logged,
    run,
)

from coda_jax import bundled, checkpoints, cli, methods, trees
from coda_jax.checkpoints.t5x import read_t5x
from coda_jax.commands import convert
from coda_jax.data.seqio_converters import TokensFeatureConverter, VectorsFeatureConverter
from coda_jax.methods import Coda, Lora, ParallelAdapter
from coda_jax.models import init_params, preset
from coda_jax.models.t5.config import infer_config
from coda_jax.objectives import Seq2Seq
from coda_jax.tasks import offline_images, offline_speech  # noqa: F401 (the tasks)

# Not "t5x": this folder of tests would be found under that name.
pytest.importorskip(
    "t5x.models", reason="T5X is not installed: make test-t5x T5X_PATH=...", exc_type=ImportError
)
t5x = importlib.import_module("t5x")
t5x_partitioned = importlib.import_module("t5x_partitioned")

# T5X's own network, model and optimizer, with our vocabulary and a task that needs no download.
DENSE_GIN = """
from __gin__ import dynamic_registration
from t5x import utils
from t5x.examples.t5 import network
from coda_jax.data import seqio_tasks
from coda_jax.tasks import offline

include 't5x/examples/t5/t5_1_1/tiny.gin'
include 't5x/configs/runs/pretrain.gin'

VOCABULARY = @seqio_tasks.seqio_vocabulary()
utils.create_learning_rate_scheduler.warmup_steps = 10
utils.SaveCheckpointConfig.period = 2
network.T5Config.dtype = 'float32'
"""


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
    """A folder with the gin files of the tiny model."""
    folder = tmp_path_factory.mktemp("t5x")
    for name, text, module in (("dense", DENSE_GIN, "network"), ("ours", OUR_GIN, "t5")):
        sizes = (f"{module}.T5Config.{size} = {value}\n" for size, value in SIZES.items())
        (folder / f"{name}.gin").write_text(text + "".join(sizes))
    return folder


@pytest.fixture(name="dense", scope="module", params=["orbax", "legacy"])
def fixture_dense(request, folder):
    """A dense checkpoint that `t5x.train` wrote, in each of its formats."""
    directory = folder / f"dense_{request.param}"
    bindings = {
        **SHARED,
        "MODEL_DIR": f"'{directory}'",
        "TRAIN_STEPS": "2",
        "seqio_vocabulary.path": f"'{VOCABULARY}'",
        "train.use_orbax": request.param == "orbax",
        "train.eval_steps": "1",
    }
    run("train", ["dense.gin"], bindings, folder)
    return directory / "checkpoint_2"


ADAPTATION = (Coda(3, max_segments=8), ParallelAdapter(bottleneck=4))


def adapted_config(base):
    return infer_config(base).replace(methods=ADAPTATION, dropout_rate=0.0)


def validation_loss(directory, step, task="stdlib_module"):
    """T5X's loss on the first validation batch."""
    return logged(directory / "training_eval" / task, "loss")[step]


def our_loss(config, params, task="stdlib_module", converter=None):
    """Our loss on the same batch."""
    dataset = seqio.get_dataset(
        task,
        task_feature_lengths={"inputs": 64, "targets": 16},
        dataset_split="validation",
        shuffle=False,
        feature_converter=converter or TokensFeatureConverter(8, pack=True),
        seed=42,
    )
    batch = next(dataset.repeat().batch(8).as_numpy_iterator())
    model = Seq2Seq(config, z_loss=1e-4)
    return float(jax.jit(model.loss)(params, batch)[0])


def test_finetuning_changes_what_is_trained_only_and_has_our_loss(dense, folder):
    directory = folder / f"finetune_{dense.parent.name}"
    bindings = finetune(dense, directory) | {"train.run_eval_before_training": "True"}
    run("train", FINETUNE_FILES, bindings, folder)
    base, after = (read_t5x(path)[0] for path in (dense, directory))
    config = adapted_config(base)
    np.testing.assert_allclose(validation_loss(directory, 22), our_loss(config, after), rtol=1e-5)
    trained, frozen = map(trees.flatten, methods.partition(config, after))
    flat = trees.flatten(base)
    for path, leaf in frozen.items():
        assert leaf.tobytes() == flat[path].tobytes(), path
    first = trees.flatten(checkpoints.load_t5x(directory, config, 12))
    for path, leaf in trained.items():
        assert (leaf != first[path]).any(), path
        assert path not in flat or (leaf != flat[path]).any(), path

    # From a checkpoint with adapters and routers: step 0 has our loss for the same weights.
    again = folder / f"again_{dense.parent.name}"
    bindings = finetune(directory / "checkpoint_12", again, TRAIN_STEPS="13")
    bindings |= {"train.run_eval_before_training": "True"}
    run("train", FINETUNE_FILES, bindings, folder)
    expected = our_loss(config, checkpoints.load_t5x(directory, config, 12))
    np.testing.assert_allclose(validation_loss(again, 12), expected, rtol=1e-5)


# (file of t5x/, preset and changes, task, methods)
OTHER_INPUTS = [
    ("images", ("pix2struct_tiny", {"emb_dim": 16, "mlp_dim": 24}), "digit_strips", ADAPTATION),
    (
        "speech",
        ("w2v_bert_tiny", {"emb_dim": 16, "mlp_dim": 24, "num_decoder_layers": 1}),
        "spoken_digits_clean",
        (Lora(), ADAPTATION[0]),
    ),
]
OTHER_GIN = """
from __gin__ import dynamic_registration
from coda_jax.tasks import {module}

PRESET = {preset!r}
PRESET_CHANGES = {changes}
"""


@pytest.mark.parametrize(("family", "sizes", "task", "adaptation"), OTHER_INPUTS)
def test_other_inputs_are_trained_and_evaluated_with_our_loss(
    family, sizes, task, adaptation, folder
):
    name, changes = sizes
    text = OTHER_GIN.format(module=f"offline_{family}", preset=name, changes=changes)
    if family == "speech":  # whose file asks for it
        text = text.replace("_layers': 1", "_layers': %NUM_DECODER_LAYERS")
        text += "NUM_DECODER_LAYERS = 1\n"
    (folder / f"{family}.gin").write_text(text)
    config = preset(name, **changes, dropout_rate=0.0)
    base = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    checkpoints.save_t5x(folder / f"{family}_dense", base)
    directory = folder / family
    changes = {"MIXTURE_OR_TASK_NAME": f"'{task}'", "TRAIN_STEPS": "2", "VOCABULARY": "'bytes'"}
    changes |= {"EVAL_PERIOD": "2", "SaveCheckpointConfig.period": "2"}
    changes["METHODS"] = str(tuple(method.name for method in adaptation))
    bindings = finetune(folder / f"{family}_dense" / "checkpoint_0", directory, **changes)
    if not any(isinstance(method, ParallelAdapter) for method in adaptation):
        del bindings["ParallelAdapter.bottleneck"]  # which has no effect, and is refused
    files = ["t5x/finetune.gin", f"t5x/{family}.gin", f"{family}.gin", *METHOD]
    run("train", files, bindings, folder)
    config = config.replace(methods=adaptation)
    after = checkpoints.load_t5x(directory, config)
    expected = our_loss(config, after, task, VectorsFeatureConverter(pack=False))
    np.testing.assert_allclose(validation_loss(directory, 2, task), expected, rtol=1e-5)
    trained, frozen = map(trees.flatten, methods.partition(config, after))
    flat = trees.flatten(base)
    assert all(np.array_equal(leaf, flat[path]) for path, leaf in frozen.items())
    assert all((leaf != flat[path]).any() for path, leaf in trained.items() if path in flat)


# --- Decoding, with the bundled checkpoint: what it answers is not noise. ---


@pytest.fixture(name="answering", scope="module")
def fixture_answering(tmp_path_factory):
    """The bundled CoDA checkpoint as T5X's, and a JSONL file of functions with their summaries."""
    folder = tmp_path_factory.mktemp("answering")
    convert.convert(str(bundled.CODA / "adapter"), str(folder), "t5x", base=str(bundled.CODA))
    source = seqio.TaskRegistry.get("stdlib_summary").source
    with (folder / "validation.jsonl").open("w") as file:
        for example in source.get_dataset("validation", shuffle=False).take(48).as_numpy_iterator():
            line = {name: text.decode() for name, text in example.items()}
            file.write(json.dumps(line) + "\n")
    return folder


ANSWER_FILES = [*METHOD, "tasks/jsonl.gin"]


def answer_bindings(folder):
    return {
        "PRESET": "'t5_1_1_stdlib'",
        "CHECKPOINT_PATH": f"'{folder}/checkpoint_0'",
        "VOCABULARY": f"'{VOCABULARY}'",
        "VALIDATION_FILE": f"'{folder}/validation.jsonl'",
        "TASK_FEATURE_LENGTHS": "{'inputs': 128, 'targets': 32}",
        "NUM_BEAMS": "4",
    }


def coda(program, folder, output, num_beams=4):
    """Runs our command on the same lines; returns the file that it wrote."""
    bindings = {
        "INITIAL_CHECKPOINT_PATH": f"'{bundled.CODA}'",
        "INITIAL_ADAPTER_PATH": f"'{bundled.CODA / 'adapter'}'",
        "Decoding.max_decode_length": "32",
        "Decoding.max_input_length": "128",
        "Decoding.num_beams": str(num_beams),
        "OUTPUT": f"'{output}/output'",
    }
    file = f"'{folder}/validation.jsonl'"
    if program == "evaluate":
        files, bindings["VALIDATION_FILE"] = ["tasks/jsonl.gin"], file
        bindings["TASK_FEATURE_LENGTHS"] = "{'inputs': 128, 'targets': 32}"
    else:
        files, bindings["INPUT"] = [], file
    flags = [f"--gin_file={name}" for name in (f"runs/{program}.gin", *files)]
    cli.run([program, *flags, *(f"--gin.{name}={value}" for name, value in bindings.items())])
    gin.clear_config()
    return output / "output"


def test_evaluation_with_four_beams_gives_our_metrics(answering, tmp_path):
    bindings = answer_bindings(answering) | {"EVAL_OUTPUT_DIR": f"'{answering}/eval'"}
    run("eval", ["t5x/eval.gin", *ANSWER_FILES], bindings, answering)
    (file,) = answering.glob("eval/inference_eval/*-metrics.jsonl")
    theirs = json.loads(file.read_text().splitlines()[-1])
    theirs.pop("step")
    (ours,) = json.loads(coda("evaluate", answering, tmp_path).read_text()).values()
    assert theirs == pytest.approx(ours)
    assert max(ours.values()) > 20  # per cent of the lines


def test_inference_gives_our_predictions(answering, tmp_path):
    bindings = answer_bindings(answering) | {"INFER_OUTPUT_DIR": f"'{answering}/infer'"}
    bindings |= {"SPLIT": "'validation'"}
    run("infer", ["t5x/infer.gin", *ANSWER_FILES], bindings, answering)
    (file,) = answering.glob("infer/*.jsonl-00000-of-00001")
    theirs = [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
    ours = coda("predict", answering, tmp_path).read_text().splitlines()
    # The task strips what it is given; a command writes what the model answers.
    assert theirs == [json.loads(line)["prediction"].strip() for line in ours]


def test_sampling_is_t5xs_and_the_likeliest_token_alone_is_greedy(answering, tmp_path):
    bindings = answer_bindings(answering) | {"INFER_OUTPUT_DIR": f"'{answering}/sampled'"}
    bindings |= {"SPLIT": "'validation'", "TOP_K": "1", "TEMPERATURE": "0.8", "NUM_SAMPLES": "2"}
    del bindings["NUM_BEAMS"]  # of the beam search, and refused here
    run("infer", ["t5x/infer.gin", "t5x/sampling.gin", *ANSWER_FILES], bindings, answering)
    (file,) = answering.glob("sampled/*.jsonl-00000-of-00001")
    theirs = [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
    ours = coda("predict", answering, tmp_path, num_beams=1).read_text().splitlines()
    assert theirs == [json.loads(line)["prediction"].strip() for line in ours]


# --- Many devices, and T5X's own tests. ---


def test_eight_devices_give_the_loss_of_one():
    script = t5x_partitioned.__file__
    devices = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    many = json.loads(result.stdout.splitlines()[-1])
    assert many["mesh"] == {"data": 4, "model": 2}
    assert many["adapter_shards"] == ["(16, 2)"]  # of (16, 4)
    state, step = t5x_partitioned.make_step()
    one, _ = t5x_partitioned.losses(state, jax.jit(step))
    np.testing.assert_allclose(many["losses"], one, rtol=1e-5)
    assert one[2] < one[0]


# Of the package t5, which brings nightly builds of seqio and TFDS, these tests use nothing.
SWAP = """
import sys, types
for name in ("t5", "t5.data", "t5.data.tasks"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["t5"].data = sys.modules["t5.data"]

from t5x.examples.t5 import network
from coda_jax.models.t5.config import T5Config
from coda_jax.models.t5.network import Transformer
network.T5Config, network.Transformer = T5Config, Transformer
"""


def test_tests_of_t5x_pass_with_our_network_in_the_place_of_its_example(tmp_path):
    pytest.importorskip("chex", reason="tests of T5X need chex")
    (tmp_path / "swap_network.py").write_text(SWAP)
    root = Path(t5x.__path__[0]).parent
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"}
    names = ["optimizers", "models", "decoding", "partitioning", "trainer"]
    files = ["t5x/examples/t5/network_test.py", *(f"t5x/{name}_test.py" for name in names)]
    options = ["-q", "-n0", "-p", "swap_network", "-p", "no:cacheprovider"]
    line = [sys.executable, "-m", "pytest", *options, *files]
    result = subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 100
