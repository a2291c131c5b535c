"""A T5X run that is cut off and started again ends as an undisturbed one, to the last bit.

Run with T5X's checkout on PYTHONPATH (`make test-t5x`); each start takes half a minute.
"""

import functools
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from t5x_programs import FINETUNE_FILES, command, finetune, run, write_model

from coda_jax import trees
from coda_jax.checkpoints.t5x import read_t5x

pytest.importorskip(
    "t5x.models", reason="T5X is not installed: make test-t5x T5X_PATH=...", exc_type=ImportError
)

FIRST, PERIOD, LAST = 2, 3, 20
OPTIMIZERS = {
    "adamw": "",
    "t5x_adafactor": """
from __gin__ import dynamic_registration
from t5x import adafactor

OPTIMIZER = @adafactor.Adafactor()
adafactor.Adafactor.logical_factor_rules = @adafactor.standard_logical_factor_rules()
""",
    "optax_adafactor": """
from __gin__ import dynamic_registration
import optax
from t5x import optimizers

OPTIMIZER = @optimizers.chain()
optimizers.chain.transformations = [@optax.clip(), @optax.adafactor()]
optax.clip.max_delta = 1.0
optax.adafactor.learning_rate = %LEARNING_RATE
""",
}


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
    """A folder with gin files and a dense checkpoint."""
    folder = tmp_path_factory.mktemp("t5x")
    for name, text in OPTIMIZERS.items():
        (folder / f"{name}.gin").write_text(text)
    write_model(folder, FIRST)
    return folder


class Run:
    """A run with an optimizer in a folder, which may be started more than once."""

    def __init__(self, folder, optimizer, name):
        self.directory = folder / f"{optimizer}_{name}"
        self._files = [*FINETUNE_FILES, f"{optimizer}.gin"]
        dense = folder / "dense" / f"checkpoint_{FIRST}"
        self._bindings = finetune(dense, self.directory, TRAIN_STEPS=str(LAST))
        self._bindings |= {"EVAL_PERIOD": str(PERIOD), "DROPOUT_RATE": "0.1"}
        self._bindings["train.infer_eval_dataset_cfg"] = "None"  # answers take long to compile
        self._bindings["SaveCheckpointConfig.period"] = str(PERIOD)
        self._folder = folder

    def steps(self):
        """The steps that are saved."""
        found = self.directory.glob("checkpoint_*")
        return sorted(int(path.name.split("_")[1]) for path in found if path.name[11:].isdigit())

    def finish(self):
        """Runs to the end; returns {path: leaf} of the last checkpoint."""
        run("train", self._files, self._bindings, self._folder)
        return trees.flatten(read_t5x(self.directory)[0])

    def cut_off(self, signum):
        """Sends a signal after the second checkpoint; returns (exit code, standard error)."""
        line = command("train", self._files, self._bindings, self._folder)
        log = self._folder / f"{self.directory.name}.log"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        with (
            log.open("w") as stderr,
            subprocess.Popen(line, env=environment, stderr=stderr) as process,
        ):
            while len(self.steps()) < 2:
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(0.05)
            process.send_signal(signum)
        return process.returncode, log.read_text()


@pytest.fixture(name="undisturbed", scope="module")
def fixture_undisturbed(folder):
    """{path: leaf} at the end of a run with an optimizer that nothing disturbs."""
    return functools.cache(lambda optimizer: Run(folder, optimizer, "undisturbed").finish())


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(name, marks=[pytest.mark.all] * (name != "adamw")) for name in OPTIMIZERS],
)
def test_a_killed_run_ends_as_an_undisturbed_one(optimizer, folder, undisturbed):
    killed = Run(folder, optimizer, "killed")
    assert killed.cut_off(signal.SIGKILL)[0] == -signal.SIGKILL
    assert killed.steps()[-1] < LAST
    assert_same_bits(killed.finish(), undisturbed(optimizer))


def test_a_run_that_is_asked_to_stop_saves_its_state(folder, undisturbed):
    stopped = Run(folder, "adamw", "stopped")
    code, said = stopped.cut_off(signal.SIGTERM)
    last = stopped.steps()[-1]
    assert code == 1 and f"Stopped: stopped by SIGTERM: step {last} is saved" in said
    assert FIRST + PERIOD < last < LAST
    assert_same_bits(stopped.finish(), undisturbed("adamw"))
