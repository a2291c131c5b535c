"""T5X's own programs with our gin files, on a model that is tiny: how tests start them."""

import os
from pathlib import Path
import subprocess
import sys

import jax

from coda_jax import checkpoints, gin_configs
from coda_jax.models import init_params
from coda_jax.models.t5.config import T5Config
from coda_jax.tasks import offline

GIN = str(next(iter(gin_configs.__path__)))
VOCABULARY = str(Path(offline.VOCABULARY_FILE).parent)
LAYERS = {
    "emb_dim": 8,
    "num_heads": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "head_dim": 4,
    "mlp_dim": 16,
}
SIZES = {"vocab_size": 4096, **LAYERS}
OUR_GIN = """
from __gin__ import dynamic_registration
from coda_jax.models.t5 import config as t5
from coda_jax.tasks import offline

CONFIG = @t5.T5Config()
t5.T5Config.mlp_activations = ('gelu', 'linear')
"""
SHARED = {
    "MIXTURE_OR_TASK_NAME": "'stdlib_module'",
    "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 16}",
    "BATCH_SIZE": "8",
    "DROPOUT_RATE": "0.0",
    "USE_CACHED_TASKS": "False",
    "RANDOM_SEED": "0",
}
METHOD = ["methods/coda.gin"]


def write_model(folder, step):
    """Writes what runs of the tiny model start from: ours.gin, and a dense checkpoint of a step."""
    sizes = (f"t5.T5Config.{size} = {value}\n" for size, value in SIZES.items())
    (folder / "ours.gin").write_text(OUR_GIN + "".join(sizes))
    config = T5Config(**SIZES, mlp_activations=("gelu", "linear"))
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return checkpoints.save_t5x(folder / "dense", params, step)


def command(program, files, bindings, folder):
    """The command line of a program of T5X, with gin files written for the test in its folder."""
    flags = [f"--gin_search_paths={GIN},{folder}"]
    flags += [f"--gin_file={name}" for name in files]
    flags += [f"--gin.{name}={value}" for name, value in bindings.items()]
    return [sys.executable, "-m", f"t5x.{program}", *flags]


def run(program, files, bindings, folder):
    # One device: T5X would divide the model among all devices of a CPU.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    result = subprocess.run(
        command(program, files, bindings, folder), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def coda_command(program, files, bindings):
    """The command line of `coda t5x`, whose values need no quotes of gin's."""
    flags = [f"--gin_file={name}" for name in files]
    flags += [f"--gin.{name}={value}" for name, value in bindings.items()]
    return [sys.executable, "-m", "coda_jax.cli", "t5x", program, *flags]


def coda(folder, program, files, bindings):
    """What `coda t5x` does, as a process in a folder, with one device."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    line = coda_command(program, files, bindings)
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


def finetune(dense, directory, **changes):
    return {
        **SHARED,
        "VOCABULARY": f"'{VOCABULARY}'",
        "MODEL_DIR": f"'{directory}'",
        "INITIAL_CHECKPOINT_PATH": f"'{dense}'",
        "TRAIN_STEPS": "22",
        "EVAL_STEPS": "1",
        "EVALUATOR_NUM_EXAMPLES": "8",
        "EVAL_PERIOD": "10",
        "DTYPE": "'float32'",
        "SaveCheckpointConfig.period": "10",
        "ParallelAdapter.bottleneck": "4",
        "Coda.max_segments": "8",
        **changes,
    }


FINETUNE_FILES = ["t5x/finetune.gin", "ours.gin", *METHOD]


def logged(folder, name):
    """{step: value} of a metric in T5X's TensorBoard file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    events = accumulator.Tensors(name)
    return {event.step: float(make_ndarray(event.tensor_proto)) for event in events}
