"""Eight devices as data 4 x model 2 train and answer as one does, and each holds its share.

On virtual devices of this machine; see `divided_runs`.
"""

import json
import os
import subprocess
import sys

import divided_runs
import pytest

# Each family, each method; what is left is marked `all`.
DEFAULT = ("t5-parallel_adapter", "pix2struct-coda", "wav2vec2-bert-lora")


def report_of(cases):
    """What the program prints of some cases."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, divided_runs.__file__, *cases]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(name="report", scope="module")
def fixture_report():
    return report_of(DEFAULT)


def check(found):
    """Four steps of Adam with dropout, in two parts; the answers of what came out."""
    assert found["moved"] > 1e-2
    assert found["parameters"] < 1e-4
    assert found["metrics"] < 1e-5
    assert found["resumed"], "a run that was cut off ends with other bits"
    assert found["tokens"], "other tokens"
    assert found["numbers"] < 1e-5


@pytest.mark.parametrize("case", DEFAULT)
def test_runs_and_answers_are_those_of_one_device(report, case):
    check(report[case])


@pytest.mark.all
@pytest.mark.parametrize("case", sorted({*divided_runs.CASES} - {*DEFAULT}))
def test_runs_and_answers_of_other_methods_are_those_of_one_device(case):
    check(report_of([case])[case])


def test_a_device_holds_its_share_of_what_is_frozen(report):
    """By the compiler's own count of the step's arguments."""
    found = report["memory"]
    whole, halves, quarters = found.values()
    assert whole["frozen"] == whole["frozen whole"]
    assert halves["frozen"] < 0.55 * whole["frozen"] and quarters["frozen"] < 0.3 * whole["frozen"]
    for row in found.values():
        assert row["held"] <= row["arguments"] < 1.02 * row["held"]
