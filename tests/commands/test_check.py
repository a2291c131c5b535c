"""`coda check`: what does not fit is listed before a run starts, and costs are those counted."""

import json
import re
import sys

from helpers import ADAPTER, GOLDEN, TINY_SPEECH, config, random_params, unpack
import jax
import numpy as np
import pytest

from coda_jax import checkpoints, cli, trees
from coda_jax.checkpoints.t5x import read_t5x
from coda_jax.checkpoints.t5x_scanned import to_scanned
from coda_jax.commands.check import check, check_leaves, compare_leaves, costs, stored_shapes
from coda_jax.commands.check_topology import settings
from coda_jax.methods import Coda, Full, partition
from coda_jax.models.t5.config import infer_config
from coda_jax.profiling import flops, topology, tpu

CODA = config(coda={"reduction": 2.0})
DENSE = CODA.dense()
SCANNED = config(relpos_num_buckets=32, relpos_max_distance=128)


def save(folder, flat):
    checkpoints.save_t5x(folder, trees.unflatten(flat))
    return str(folder)


@pytest.fixture(name="dense")
def fixture_dense(tmp_path):
    """A dense T5X checkpoint."""
    return save(tmp_path / "dense", trees.flatten(random_params(DENSE)))


@pytest.fixture(name="routed")
def fixture_routed(tmp_path):
    """A T5X checkpoint with adapters and routers."""
    return save(tmp_path / "routed", trees.flatten(random_params(CODA)))


def test_shapes_are_those_of_what_is_loaded(routed):
    for folder, params in (
        (routed, read_t5x(routed)[0]),
        (GOLDEN / "v1_1", checkpoints.load_hf(GOLDEN / "v1_1")[1]),
    ):
        found, loaded = (trees.flatten(tree) for tree in (stored_shapes(str(folder)), params))
        assert {path: (leaf.shape, leaf.dtype) for path, leaf in found.items()} == {
            path: (leaf.shape, leaf.dtype) for path, leaf in loaded.items()
        }


def test_a_scanned_checkpoint_is_compared_layer_by_layer(tmp_path):
    folder = unpack("t5x/scanned", tmp_path)
    cfg = infer_config(read_t5x(folder)[0])
    check_leaves(cfg, str(folder))
    with pytest.raises(ValueError, match=r"(\n.*)*  missing: encoder/layers_2/mlp/wo/kernel"):
        check_leaves(cfg.replace(num_encoder_layers=3), str(folder))


def test_adapters_and_routers_are_created_or_restored_as_they_are_found(dense, routed):
    assert check_leaves(CODA, dense) == check_leaves(CODA, dense, "created") == "created"
    assert check_leaves(CODA, routed) == check_leaves(CODA, routed, "restored") == "restored"
    full = DENSE.replace(methods=(Full(),))
    assert all(check_leaves(full, dense, word) for word in ("found", "created", "restored"))
    with pytest.raises(ValueError, match=r"is an adapted checkpoint: it has 8 leaves .* NEW_LEAV"):
        check_leaves(CODA, routed, "created")
    with pytest.raises(ValueError, match=r"is a dense checkpoint: it has none of the 8 leaves of"):
        check_leaves(CODA, dense, "restored")
    with pytest.raises(ValueError, match=r"NEW_LEAVES must be one of .* got 'dropped'"):
        check_leaves(CODA, dense, "dropped")


OTHER_METHODS = {
    "full": ((Full(),), r"adapted with \['coda', 'parallel_adapter'\]: METHODS=\('full',\) does"),
    "adapter": ((ADAPTER,), r"adapted with \['coda'\]: .* use 2 of .* such as .*router/kernel"),
    "none": ((), r"adapted with \['coda', 'parallel_adapter'\]: METHODS=\(\) does not use 8 of"),
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_the_methods_of_an_adapted_checkpoint_are_named_in_a_line(name, routed):
    methods, message = OTHER_METHODS[name]
    with pytest.raises(ValueError, match=message) as error:
        check_leaves(DENSE.replace(methods=methods), routed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("new_leaves", ["found", "restored"])
def test_the_leaves_that_a_partly_adapted_checkpoint_lacks_are_listed(new_leaves, tmp_path):
    flat = dict(trees.flatten(random_params(CODA)))
    del flat["encoder/layers_1/router/kernel"]
    checkpoint = save(tmp_path / "partly", flat)
    with pytest.raises(
        ValueError, match=r"\(1 leaves\):\n  missing: encoder/layers_1/router/kernel"
    ):
        check_leaves(CODA, checkpoint, new_leaves)


def test_a_checkpoint_of_stacked_layers_that_lies_elsewhere_is_named_as_one():
    """T5X shows its table of leaves, whose values are not read."""
    stacked = to_scanned(SCANNED, random_params(SCANNED))
    table = dict.fromkeys(trees.flatten(stacked))
    with pytest.raises(ValueError, match=r"scalable T5, whose stacked layers \(decoder/dec") as e:
        compare_leaves(SCANNED, table, "gs://bucket/checkpoint_5")
    assert "`coda convert` with LAYOUT='t5x'" in str(e.value) and "\n" not in str(e.value)


def test_all_leaves_that_do_not_fit_are_listed(tmp_path):
    flat = dict(trees.flatten(random_params(DENSE)))
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


def test_a_table_without_shapes_is_compared_by_its_names():
    """As that of orbax, which T5X shows before it restores a checkpoint, wherever that lies."""
    dense = dict.fromkeys(trees.flatten(random_params(DENSE)))
    compare_leaves(CODA, dense, "it")
    third = {**dense, "encoder/layers_2/mlp/wo/kernel": None}
    with pytest.raises(ValueError, match=r"\(1 leaves\):\n  extra: encoder/layers_2/mlp/wo/kernel"):
        compare_leaves(CODA, third, "it")
    with pytest.raises(ValueError, match=r"it is a dense checkpoint"):
        compare_leaves(CODA, dense, "it", "restored")
    with pytest.raises(ValueError, match=r"wrong shape: encoder/encoder_norm/scale is \(3,\)"):
        compare_leaves(CODA, {**dense, "encoder/encoder_norm/scale": (3,)}, "it")


def test_a_missing_part_of_a_file_is_found_where_asked_for(tmp_path, capsys):
    cfg = infer_config(read_t5x(unpack("t5x/legacy", tmp_path))[0])
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
    report = check(dense, DENSE, CODA.methods, feature_lengths=lengths, output=output)
    assert json.loads(output.read_text()) == report
    params = random_params(CODA)
    assert report["parameters"] == trees.count(params)
    assert report["trained_parameters"] == trees.count(partition(CODA, params)[0])
    encoder = flops.encoder_flops(CODA, 1, 32)
    assert report["flops_per_input_token"] == encoder / 32
    answer = flops.answer_flops(CODA, 1, 32, 4)
    assert 4 * report["flops_per_output_token"] + encoder == pytest.approx(answer)
    baseline = flops.encoder_flops(CODA.replace(methods=(ADAPTER,)), 1, 32)
    assert report["encoder_flops_ratio"] == baseline / encoder > 1.5
    printed = capsys.readouterr().out
    assert f"{trees.count(params):,}" in printed
    assert "a dense checkpoint, and the leaves of coda, parallel_adapter start anew" in printed


def test_what_is_trained_follows_from_the_methods(dense):
    reports = [check(dense, DENSE, methods) for methods in ((), (ADAPTER,), (Full(),))]
    trained = [report["trained_parameters"] for report in reports]
    assert trained[0] == 0 < trained[1] < trained[2] == reports[2]["parameters"]


def test_a_head_of_ctc_is_counted_for_every_frame():
    counted = costs(TINY_SPEECH, inputs=100, targets=10)["flops_per_output_token"] * 10
    assert counted == 2 * 100 * TINY_SPEECH.emb_dim * TINY_SPEECH.vocab_size


def test_the_command_takes_model_and_methods(tmp_path, capsys):
    arguments = ["check", "--gin_file=runs/check.gin", "--gin_file=methods/coda.gin"]
    hf = f"--gin.INITIAL_CHECKPOINT_PATH={GOLDEN / 'v1_1'}"
    assert cli.main([*arguments, hf]) == 0
    assert "fits the model" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"wrong shape: token_embedder/embedding"):
        cli.run([*arguments, "--gin.PRESET=t5_1_1_small", hf])
    _, params = checkpoints.load_hf(GOLDEN / "v1_1")
    t5x = save(tmp_path, trees.flatten(jax.tree.map(np.asarray, params)))
    with pytest.raises(ValueError, match="does not say its sizes: give a PRESET"):
        check(t5x, methods=(Coda(), ADAPTER))
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        check(str(tmp_path / "nothing_here"), DENSE)


def test_a_preset_alone_is_counted(capsys):
    arguments = ["check", "--gin_file=runs/check.gin", "--gin_file=methods/coda.gin"]
    assert cli.main([*arguments, "--gin.PRESET=t5_1_1_small"]) == 0
    printed = capsys.readouterr().out
    assert "trained_parameters" in printed and "fits" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to check: give INITIAL_CHECKPOINT_PATH or PRESET"),
        ({"config": DENSE, "read_values": True}, "READ_VALUES=True has no effect without INITIAL"),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check(**options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mesh", {"data": 4}),
        ("batch_size", 8),
        ("dtype", "bfloat16"),
        ("accumulation", 2),
        ("remat_policy", "full"),
    ],
)
def test_an_option_of_a_topology_alone_is_refused(option, value):
    message = f"{option.upper()}={value!r} has no effect without TOPOLOGY"
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**{option: value})


def test_a_topology_needs_the_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'coda_jax\[tpu\]'"):
        settings("v5e:2x2")


def test_what_each_chip_holds_and_sends_is_printed(monkeypatch, capsys):
    """Also of a program that does not fit; the compiler's part is made up."""

    def compile_for(name, function, arguments, pod):
        assert name == "v5e:2x2"
        rows = jax.tree.leaves(arguments)[-1]
        assert rows.sharding.shard_shape(rows.shape)[0] == rows.shape[0] // 2
        if hasattr(function, "lower"):  # the training step
            raise topology.TooLargeError("Used 17G of 15G hbm")
        cost = tpu.Cost(total=2e6)
        sent = "all-reduce", "encoder/layers_0/adapter/dot"
        cost.collectives[sent], cost.collective_bytes[sent] = 3, 2**20
        return topology.Program(cost, 1.0, 2.0, 4.0, 2**20, 2**21, fits=True)

    monkeypatch.setattr(topology, "chips", lambda name, whole: jax.devices()[:2])
    monkeypatch.setattr(topology, "compile_for", compile_for)
    lengths = {"inputs": 8, "targets": 3}
    given = settings("v5e:2x2", accumulation=2, remat_policy="full")
    found = check(None, DENSE, CODA.methods, topology=given, feature_lengths=lengths)
    report = found["topology"]
    assert report["mesh"] == {"data": 2, "model": 1} and report["batch_size"] == 16
    step = report["programs"]["train_step"]
    assert step == {"fits": False, "refused": "Used 17G of 15G hbm"}
    printed = capsys.readouterr().out
    assert "| encoder | 1 MiB | 2 MiB | yes, 16 GB | 2.00 | 0% | 4 s | 3, 1.0 MiB |" in printed
    assert "| train step |  | | NO: Used 17G of 15G hbm | | | |  |" in printed
    assert printed.count("| all-reduce | adapter | 3 | 1.00 |") == 3
