"""Eight devices as data 4 x model 2 train and answer as one does, and each holds its share.

On virtual devices of this machine; see `divided_runs`. What two devices can show is in
`test_trainer`, what whole programs exchange in `test_pods`.
"""

import json
import os
import subprocess
import sys

import divided_runs
import pytest

pytestmark = pytest.mark.all


def report_of(name):
    """What the program prints of a case, or of the memory."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, divided_runs.__file__, name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", divided_runs.CASES)
def test_runs_and_answers_are_those_of_one_device(case):
    """Four steps of Adam with dropout, in two parts; what they leave answers."""
    found = report_of(case)
    assert found["moved"] > 1e-2
    assert found["parameters"] < 1e-5
    assert found["metrics"] < 1e-5
    assert found["resumed"], "a run that was cut off ends with other bits"
    assert found["tokens"], "other tokens"
    assert found["numbers"] < 1e-5


def test_a_device_holds_its_share():
    """By the compiler's own count of a step's arguments."""
    whole, halves, quarters = report_of("memory")
    assert halves["frozen"] < 0.51 * whole["frozen"]
    assert quarters["frozen"] < 0.26 * whole["frozen"]
    assert whole["temporary"] > halves["temporary"] > quarters["temporary"]
    for row in (whole, halves, quarters):
        assert row["arguments"] == row["held"]
