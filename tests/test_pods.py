"""Programs divided over the chips of a pod: equal to undivided ones, and chips send what they must.

On eight virtual devices of this machine, data 4 x model 2, with what it runs and what a TPU would.
The rows are 8 (4 beams: 32), the tokens 12, of which 6 are selected, D = 16, 2 heads of 8.
"""

import json
import math
import os
import re
import subprocess
import sys

import divided_programs
import pytest

from coda_jax.sharding import checked_mesh

EVERY = [(branch, name) for branch, names in divided_programs.PROGRAMS.items() for name in names]


@pytest.fixture(scope="module")
def report():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    result = subprocess.run(
        [sys.executable, divided_programs.__file__], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def sizes(shapes):
    """[dimensions] of each array that a program's text names."""
    found = re.findall(r"\w+\[([\d,]*)\]", re.sub(r"/\*.*?\*/", "", shapes))
    return [[int(n) for n in shape.split(",") if n] for shape in found]


@pytest.mark.parametrize(("branch", "name"), EVERY)
def test_results_are_those_of_one_device(report, branch, name):
    assert report[branch][name]["difference"] < 1e-5


@pytest.mark.parametrize(("branch", "name"), EVERY)
def test_rows_are_routed_where_they_are(report, branch, name):
    """Of what the router does only the gradients of its vector are added up."""
    sent = report[branch][name]["collectives"]
    assert sent
    for kind, shapes, scope in sent:
        if re.search(r"layers_\d+/(router|gather|scatter)\b", scope):
            assert name == "train_step" and kind == "all-reduce"
            assert all(12 not in size and 6 not in size for size in sizes(shapes)), shapes


@pytest.mark.parametrize(("branch", "name"), EVERY)
def test_no_logits_keys_or_values_of_attention_are_sent(report, branch, name):
    """Neither within a layer nor where beams take over those of others."""
    for kind, shapes, scope in report[branch][name]["collectives"]:
        # What `out` gives is added up over "model"; a gradient has `transpose(...out)` for it.
        inside = re.search(r"attention[./](?!out|query|\(?\w*out)", scope)
        gradient = name == "train_step" and "keys_values" in scope
        assert not inside or gradient, (kind, shapes, scope)
        taken = re.search(r"take(_along_axis)?\)/gather", scope)
        assert not taken or kind == "all-reduce", (kind, shapes, scope)


def test_a_mesh_is_seen_however_it_is_set(report):
    assert report["parts"] == {"none": [1, 1], "ours": [2, 1], "t5x": [2, 1]}


def test_beams_do_not_send_their_logits(report):
    """[2, 4 x 64] on a chip, of which the 8 best of each beam of all 8 rows remain."""
    sent = report["tpu"]["beams"]["collectives"]
    largest = max(
        math.prod(x) for kind, shapes, _ in sent if kind == "all-gather" for x in sizes(shapes)
    )
    assert largest <= 8 * 4 * 8 < 2 * 4 * 64


def test_what_can_be_divided_is(report):
    whole = {path for path, (shape, held) in report["parameters"].items() if shape == held}
    assert whole and all(re.search(r"norm/scale$|router/kernel$", path) for path in whole)
    for path, (shape, held) in report["tpu"]["train_step"]["shards"].items():
        if "'adapter'" in path:
            assert shape[0] * shape[1] == 2 * held[0] * held[1], path


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 2, "model": 2}, r"MESH must be of all 8 devices, got 2 x 2 = 4"),
        ({"rows": 8}, r"MESH must be a dictionary such as .*, got {'rows': 8}"),
        ({"data": 0, "model": 8}, r"MESH\['data'\] must be a whole number of at least 1, got 0"),
        ([4, 2], r"MESH must be a dictionary such as"),
        ({}, r"MESH must be a dictionary such as"),
    ],
)
def test_a_mesh_is_of_all_chips(mesh, message):
    with pytest.raises(ValueError, match=message):
        checked_mesh("MESH", mesh, 8)


def test_without_a_mesh_rows_alone_are_divided():
    assert checked_mesh("MESH", None, 8) == {"data": 8, "model": 1}
    assert checked_mesh("MESH", {"model": 8}, 8) == {"data": 1, "model": 8}
