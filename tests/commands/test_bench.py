"""`coda bench`: counts of operations against XLA's, the profile's parts, and the whole report."""

import dataclasses
import json

import helpers
import jax
import pytest

from coda_jax import bench, breakdown, checkpoints, cli
from coda_jax.models import EncoderDecoder

WIDE = dataclasses.replace(
    helpers.TINY, vocab_size=256, emb_dim=128, head_dim=32, num_heads=4, mlp_dim=512
)


def test_operations_belong_to_the_part_that_their_scopes_name():
    path = "jit(encode)/Transformer/encode/encoder/layers_3/"
    assert breakdown.part_of(path + "attention/query/dot_general") == "attention"
    assert breakdown.part_of(path + "attention.keys_values/key/dot_general") == "attention"
    assert breakdown.part_of(path + "router/sort") == "router"
    assert breakdown.part_of(path + "gather/jit(take)/gather") == "gather"
    assert breakdown.part_of(path + "pre_attention_layer_norm/mul") == breakdown.OTHER


def test_the_report_holds_every_figure_and_the_table_shows_it(tmp_path, capsys):
    params = EncoderDecoder(WIDE).init(jax.random.key(0))
    checkpoints.save_hf(tmp_path / "base", WIDE, params)
    flags = ["--batch_size=2", "--input_length=64", "--target_length=4", "--reductions=4"]
    file = tmp_path / "out" / "bench.json"
    flags += ["--rounds=2", f"--checkpoint={tmp_path / 'base'}", f"--json={file}"]
    assert cli.main(["bench", *flags]) == 0
    report = json.loads(file.read_text())
    names = ["parallel adapter", "CoDA r = 4, k_to_k", "CoDA r = 4, k_to_all"]
    for measure in ("encoder", "end_to_end", "train_step"):
        rows = report[measure]
        assert list(rows) == names
        assert rows[names[0]]["bound"] == rows[names[0]]["speed_up"] == 1
        assert rows[names[1]]["bound"] > rows[names[2]]["bound"] > 1
        for row in rows.values():
            assert row["ms"] > 0 and row["peak_memory_bytes"] > 0
            assert row["fraction_of_bound"] == row["speed_up"] / row["bound"]
    for name, shares in report["parts"].items():
        assert sum(shares.values()) == pytest.approx(1)
        assert (shares["router"] > 0) == ("CoDA" in name)
        assert min(shares["attention"], shares["mlp"], shares["adapter"]) > 0
    sizes = report["methods"]
    # A router has one parameter for each of the 128 features, in both layers.
    assert sizes[names[1]]["parameters"] - sizes[names[0]]["parameters"] == 2 * 128
    assert sizes[names[1]]["trained_parameters"] < 0.2 * sizes[names[1]]["parameters"]
    printed = capsys.readouterr().out
    for text in ("**train step**", f"| {names[1]} | ", "shares of the encoder's time"):
        assert text in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size=huge"], "size of t5_1_1 must be one of ('small', 'base', 'large', 'xl', 'xxl')"),
        (["--family=pix2struct", "--size=xl"], "must be one of ('base', 'large'), got 'xl'"),
        (["--size=base", "--checkpoint=x"], "not allowed with"),
        (["--family=pix2struct", "--checkpoint=x"], "--family: not allowed with"),
    ],
)
def test_a_wrong_command_line_is_explained(flags, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(flags)
    assert message in capsys.readouterr().err


def test_unknown_measures_are_refused():
    kwargs = {"batch_size": 1, "input_length": 8, "target_length": 2, "reductions": [2]}
    with pytest.raises(ValueError, match=r"got \['speed'\]"):
        bench.measure(WIDE, {}, measures=["speed"], **kwargs)


def test_patches_of_a_random_image_are_numbered_row_by_row():
    batch = bench.random_batch(helpers.TINY_IMAGES, 2, 7, 3)
    ids = batch["encoder_input_tokens"][..., :2]
    expected = [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3], [3, 1]]
    assert ids.tolist() == [expected, expected]
