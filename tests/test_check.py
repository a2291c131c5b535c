"""`coda check`: what does not fit is listed before a run starts, and costs are those counted."""

import json
from pathlib import Path
import tarfile

from helpers import config, random_params
import jax
import numpy as np
import pytest

from coda_jax import checkpoints, cli, flops
from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.check import check, check_leaves, stored_shapes
from coda_jax.convert import infer_config
from coda_jax.routing import CodaConfig

GOLDEN = Path(__file__).parent / "golden"
CODA = config(coda={"reduction": 2.0})
DENSE = CODA.dense()


def save(folder, flat):
    checkpoints.save_t5x(folder, params_lib.unflatten(flat))
    return str(folder)


@pytest.fixture(name="dense")
def fixture_dense(tmp_path):
    """A dense T5X checkpoint."""
    return save(tmp_path / "dense", params_lib.flatten(random_params(DENSE)))


@pytest.fixture(name="routed")
def fixture_routed(tmp_path):
    """A T5X checkpoint with adapters and routers."""
    return save(tmp_path / "routed", params_lib.flatten(random_params(CODA)))


def test_shapes_are_those_of_what_is_loaded(routed):
    for folder, params in (
        (routed, checkpoints.load_t5x(routed)),
        (GOLDEN / "v1_1", checkpoints.load_hf(GOLDEN / "v1_1")[1]),
    ):
        found, loaded = (params_lib.flatten(tree) for tree in (stored_shapes(str(folder)), params))
        assert {path: (leaf.shape, leaf.dtype) for path, leaf in found.items()} == {
            path: (leaf.shape, leaf.dtype) for path, leaf in loaded.items()
        }


def test_adapters_and_routers_are_either_created_or_restored(dense, routed):
    check_leaves(CODA, dense, "created")
    check_leaves(CODA, routed, "restored")
    with pytest.raises(ValueError, match=r"to be created, do(.*\n)*  extra: .*/router/kernel"):
        check_leaves(CODA, routed, "created")
    with pytest.raises(ValueError, match=r"to be restored, do(.*\n)*  missing: .*/adapter/wi/"):
        check_leaves(CODA, dense, "restored")
    with pytest.raises(ValueError, match="new_leaves='dropped'"):
        check_leaves(CODA, dense, "dropped")


def test_all_leaves_that_do_not_fit_are_listed(tmp_path):
    flat = dict(params_lib.flatten(random_params(DENSE)))
    flat["encoder/layers_0/mlp/wo/bias"] = np.zeros(3, np.float32)
    flat["encoder/encoder_norm/scale"] = np.zeros(17, np.float32)
    del flat["decoder/logits_dense/kernel"]
    checkpoint = save(tmp_path / "broken", flat)
    with pytest.raises(ValueError, match=r"\(3 leaves\)") as error:
        check_leaves(CODA, checkpoint)
    for line in ("missing: decoder/logits_dense/kernel (16, 20)",
                 "wrong shape: encoder/encoder_norm/scale is (17,), expected (16,)",
                 "extra: encoder/layers_0/mlp/wo/bias (3,)"):  # fmt: skip
        assert line in str(error.value)


def test_a_missing_part_of_a_file_is_found_where_asked_for(tmp_path, capsys):
    with tarfile.open(GOLDEN / "t5x" / "legacy.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    cfg = infer_config(checkpoints.load_t5x(tmp_path))
    chunk = next(tmp_path.rglob("target.token_embedder.embedding/0.0"))
    chunk.unlink()
    check(str(tmp_path), cfg)  # the shapes fit
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"damaged \(1 leaves\):\n  token_embedder/embedding"):
        check(str(tmp_path), cfg, read_values=True)
    assert not capsys.readouterr().out


def test_costs_are_counted_for_the_lengths_that_are_asked_for(dense, tmp_path, capsys):
    lengths = {"inputs": 32, "targets": 4}
    output = tmp_path / "report.json"
    report = check(dense, DENSE, CODA.adapter, CODA.coda, feature_lengths=lengths, output=output)
    assert json.loads(output.read_text()) == report
    shapes = random_params(CODA)
    assert report["parameters"] == params_lib.count(shapes)
    assert report["trained_parameters"] == params_lib.count(params_lib.partition(shapes)[0])
    encoder = flops.encoder_flops(CODA, 1, 32)
    assert report["flops_per_input_token"] == encoder / 32
    answer = flops.answer_flops(CODA, 1, 32, 4)
    assert 4 * report["flops_per_output_token"] + encoder == pytest.approx(answer)
    baseline = flops.encoder_flops(CODA.replace(coda=None), 1, 32)
    assert report["encoder_flops_ratio"] == baseline / encoder > 1.5
    assert f"{params_lib.count(shapes):,}" in capsys.readouterr().out


def test_the_command_takes_model_and_method(tmp_path, capsys):
    arguments = ["check", "--gin_file=runs/check.gin", "--gin_file=methods/coda.gin"]
    hf = f"--gin.INITIAL_CHECKPOINT_PATH='{GOLDEN / 'v1_1'}'"
    assert cli.main([*arguments, hf]) == 0
    assert "fits the model" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"wrong shape: token_embedder/embedding"):
        cli.main([*arguments, "--gin_file=models/t5_1_1_small.gin", hf])
    _, params = checkpoints.load_hf(GOLDEN / "v1_1")
    t5x = save(tmp_path, params_lib.flatten(jax.tree.map(np.asarray, params)))
    with pytest.raises(ValueError, match="does not say its sizes"):
        check(t5x, adapter=AdapterConfig(), coda=CodaConfig())
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        check(str(tmp_path / "nothing_here"), DENSE)
