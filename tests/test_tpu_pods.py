"""`coda check` for a pod that is not there, by the TPU's own compiler: `make test-tpu`."""

import json

import jax
import jax.numpy as jnp
import pytest

from coda_jax import cli
from coda_jax.profiling import topology

libtpu = pytest.importorskip("libtpu")
SMALL = "--gin.PRESET_CHANGES={'num_encoder_layers': 1, 'num_decoder_layers': 1}"
CHECK = ["check", "--gin_file=runs/check.gin", "--gin_file=methods/coda.gin"]
CHECK += ["--gin.PRESET=t5_1_1_small", "--gin.TOPOLOGY=v5e:2x2", SMALL]


def test_a_pod_is_told_of_what_its_chips_hold_and_send(tmp_path, capsys):
    output = tmp_path / "report.json"
    lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 256, 'targets': 8}"
    mesh = "--gin.MESH={'data': 2, 'model': 2}"
    assert cli.main([*CHECK, mesh, lengths, f"--gin.OUTPUT={output}"]) == 0
    report = json.loads(output.read_text())["topology"]
    assert report["mesh"] == {"data": 2, "model": 2} and report["batch_size"] == 16
    assert list(report["programs"]) == ["encoder", "end_to_end", "beams", "train_step"]
    for name, row in report["programs"].items():
        assert row["fits"] and row["cycles"] > 0
        assert row["collectives"]
        parts = {sent["part"] for sent in row["collectives"]}
        assert name == "train_step" or not parts & {"router", "gather", "scatter"}
        decodes = name in ("end_to_end", "beams")
        loops = {"jit(predict)/at_most_8_steps/while"} if decodes else set()
        assert set(row["unknown_loops"]) == loops
    printed = capsys.readouterr().out
    assert "One of the chips of v5e:2x2, data 2 x model 2" in printed
    assert "| encoder | all-reduce | adapter |" in printed


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("{'data': 2}", "MESH must be of all 4 devices, got 2 x 1 = 2"),
        (
            "{'data': 1, 'model': 4}",
            r"num_heads must be a multiple of the 4 devices along 'model' of the MESH, got 6",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        cli.run([*CHECK, f"--gin.MESH={mesh}"])


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_pod_has_as_many_devices_as_chips(name):
    assert len(topology.chips(name, whole=True)) == 4


def test_rows_are_divided_evenly():
    with pytest.raises(ValueError, match=r"BATCH_SIZE must be a multiple of 4 chips .* got 6"):
        cli.run([*CHECK, "--gin.BATCH_SIZE=6"])


def test_a_program_that_no_chip_holds_is_told_by_its_size():
    huge = jax.ShapeDtypeStruct((2**33,), jnp.float32)
    with pytest.raises(topology.TooLargeError, match=r"needs 64\.00GiB of 15\.75GiB"):
        topology.compile_for("v5e:2x2", jnp.sin, (huge,))
