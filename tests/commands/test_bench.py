"""`coda bench`: operations against XLA's, the profile's parts, and the whole report."""

import functools
import json

import helpers
import numpy as np
import pytest

from coda_jax import checkpoints, cli, models, trees
from coda_jax.commands import bench, bench_programs
from coda_jax.methods import Coda, ParallelAdapter
from coda_jax.profiling import topology, tpu

WIDE = helpers.TINY.replace(
    vocab_size=256, emb_dim=128, head_dim=32, num_heads=4, mlp_dim=512, num_encoder_layers=1
)
SPEECH = helpers.TINY_SPEECH.replace(conv_width=5, num_encoder_layers=1)
IMAGES = helpers.TINY_IMAGES.replace(num_encoder_layers=1)
NAMES = ["parallel adapter", "CoDA r = 4, k_to_k", "CoDA r = 4, k_to_all"]


def run(tmp_path, *flags):
    """The report of a run of `coda bench`."""
    file = tmp_path / "out" / "bench.json"
    assert cli.main(["bench", "--reductions=4", *flags, f"--json={file}"]) == 0
    return json.loads(file.read_text())


@pytest.mark.all
def test_the_report_holds_every_figure_and_the_table_shows_it(tmp_path, capsys):
    checkpoints.save_hf(tmp_path / "base", WIDE, helpers.random_params(WIDE))
    sizes = ["--batch_size=2", "--input_length=64", "--target_length=4", "--rounds=2"]
    report = run(tmp_path, *sizes, f"--checkpoint={tmp_path / 'base'}")
    assert report["settings"]["model"] == str(tmp_path / "base")
    for measure in ("encoder", "end_to_end", "train_step"):
        rows = report[measure]
        assert list(rows) == NAMES
        assert rows[NAMES[0]]["bound"] == rows[NAMES[0]]["speed_up"] == 1
        assert rows[NAMES[1]]["bound"] > rows[NAMES[2]]["bound"] > 1
        for row in rows.values():
            assert row["ms"] > 0 and row["peak_memory_bytes"] > 0
            assert row["fraction_of_bound"] == row["speed_up"] / row["bound"]
    for name, shares in report["parts"].items():
        assert sum(shares.values()) == pytest.approx(1)
        assert (shares.get("router", 0) > 0) == ("CoDA" in name)
        assert min(shares["attention"], shares["mlp"], shares["adapter"]) > 0
    sizes = report["methods"]
    # A router has one parameter for each of the 128 features.
    assert sizes[NAMES[1]]["parameters"] - sizes[NAMES[0]]["parameters"] == 128
    assert sizes[NAMES[1]]["trained_parameters"] < 0.2 * sizes[NAMES[1]]["parameters"]
    printed = capsys.readouterr().out
    for text in ("**train step**", f"| {NAMES[1]} | ", "shares of the encoder's time"):
        assert text in printed


@pytest.mark.all
@pytest.mark.parametrize(
    ("config", "measures"),
    [(IMAGES, ["encoder"]), (SPEECH, ["encoder", "train_step"])],
    ids=["images", "speech"],
)
def test_a_checkpoint_of_any_family_is_measured(config, measures, tmp_path):
    """The inputs are of the family's kind."""
    checkpoints.save_hf(tmp_path / "base", config, helpers.random_params(config))
    sizes = ["--batch_size=1", "--input_length=16", "--target_length=3", "--rounds=1"]
    flags = [f"--checkpoint={tmp_path / 'base'}", f"--measures={','.join(measures)},parts"]
    report = run(tmp_path, *sizes, *flags)
    for measure in measures:
        assert list(report[measure]) == NAMES
        assert report[measure][NAMES[1]]["bound"] > 1
    shares = report["parts"][NAMES[1]]
    own = models.family_of(config).profile_scopes
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[part] for part in (*own, "router", "adapter")) > 0


@pytest.mark.all
def test_an_encoder_without_a_head_gets_that_of_the_published_sizes(tmp_path):
    config = SPEECH.replace(vocab_size=0)
    checkpoints.save_hf(tmp_path / "base", config, helpers.random_params(config))
    sizes = ["--batch_size=1", "--input_length=16", "--target_length=3", "--rounds=1"]
    flags = [*sizes, f"--checkpoint={tmp_path / 'base'}", "--measures=end_to_end"]
    report = run(tmp_path, *flags)
    new = report["methods"][NAMES[0]]["parameters"] - trees.count(models.param_shapes(config))
    assert new == 384 * (config.emb_dim + 1) + 2 * config.emb_dim * 64


@pytest.mark.all
def test_a_preset_starts_at_random(tmp_path, monkeypatch):
    family = models.FAMILIES[SPEECH.family]
    monkeypatch.setitem(vars(family), "presets", {**family.presets, "mine": SPEECH})
    report = run(
        tmp_path, "--preset=mine", "--dtype=bfloat16", "--batch_size=2", "--input_length=8",
        "--target_length=2", "--rounds=1", "--measures=encoder",
    )  # fmt: skip
    assert (report["settings"]["model"], report["settings"]["dtype"]) == ("mine", "bfloat16")
    assert list(report["encoder"]) == NAMES
    assert report.keys() == {"settings", "versions", "methods", "encoder"}


@pytest.mark.parametrize("name", models.presets())
def test_every_preset_can_be_compared(name):
    """As the flag reads it; the comparison has the paper's adapters, at each reduction."""
    options = cli.parse_arguments(["bench", f"--preset={name}"])
    dense = models.preset(options.preset)
    found = bench_programs.compared(dense, [3, 5])
    assert found.pop("parallel adapter").methods == (ParallelAdapter(64),)
    assert [cfg.methods for cfg in found.values()] == [
        (Coda(reduction, attention=attention), ParallelAdapter(64))
        for attention in ("k_to_k", "k_to_all")
        for reduction in (3, 5)
    ]
    batch = bench_programs.random_batch(bench_programs.with_head(dense), 1, 8, 2)
    spec = dense.input_spec(1, 8)
    assert batch["encoder_input_tokens"].shape == spec.shape
    assert batch["encoder_input_tokens"].dtype == spec.dtype
    assert dense.network().input_mask(batch["encoder_input_tokens"]).all()  # rows are full


def test_for_tpus_shapes_are_enough_and_what_is_unknown_is_printed(tmp_path, monkeypatch, capsys):
    """The checkpoint has no weights any more; the compiler's part is made up."""
    checkpoints.save_hf(tmp_path / "base", helpers.TINY, helpers.random_params(helpers.TINY))
    (tmp_path / "base" / "model.safetensors").unlink()

    def compile_for(name, function, arguments):
        cost = tpu.Cost(total=200.0)
        cost.charge("router/dot", 100.0, guessed=True)
        if isinstance(function, functools.partial):  # answers, not the encoder
            cost.loops["at_most_16_steps/while"] = 7e6
        return topology.Program(cost, 1.0, 2.0, 3.0, 4, 5, fits=True)

    monkeypatch.setattr(topology, "compile_for", compile_for)
    flags = ["--topology=v5e:2x2", f"--checkpoint={tmp_path / 'base'}", "--attentions=k_to_k"]
    report = run(tmp_path, *flags, "--measures=encoder,end_to_end")
    assert list(report["encoder"]) == list(report["end_to_end"]) == NAMES[:2]
    row = report["end_to_end"][NAMES[1]]
    assert (row["lower_seconds"], row["compile_seconds"]) == (2, 3)
    printed = capsys.readouterr().out
    assert printed.count("at_most_16_steps/while is of unknown length and counts 16 times") == 2
    assert printed.count("a decoding step takes 7.00 million cycles, where reading ") == 2
    assert f"| {NAMES[1]} | 0.00 | 1.00x | " in printed and "| 2, 3 s |" in printed


def test_what_does_not_fit_is_a_row(tmp_path, monkeypatch, capsys):
    """The dense model, for example, beside CoDA that fits; the compiler's part is made up."""
    said = "XLA: Ran out of memory in memory space hbm. Used 18.92G of 15.75G hbm. Exceeded"
    calls = []

    def compile_for(name, function, arguments):
        calls.append(name)
        if len(calls) == 1:
            raise topology._too_large(said)
        return topology.Program(tpu.Cost(total=3e6), 1.0, 2.0, 3.0, 4, 5, fits=True)

    monkeypatch.setattr(topology, "compile_for", compile_for)
    sizes = ["--preset=t5_1_1_small", "--batch_size=1", "--input_length=16"]
    report = run(tmp_path, "--topology=v5e:2x2", *sizes, "--measures=train_step")
    dense, *others = report["train_step"].values()
    assert dense == {"fits": False, "refused": "needs 18.92GiB of 15.75GiB"}
    for row in others:
        assert (row["speed_up"], row["fits"], row["ms"]) == (None, True, 2.0)
    out, err = capsys.readouterr()
    assert "| NO: needs 18.92GiB of 15.75GiB |" in out
    assert "needs a smaller --batch_size or --input_length" in out
    assert f"The report is in {tmp_path / 'out' / 'bench.json'}" in err
    assert report["settings"]["dtype"] == "bfloat16" and report["versions"]["device"] == "v5e:2x2"


@pytest.mark.all
def test_what_is_measured_is_kept_when_a_later_measure_fails(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_shares", interrupted)
    checkpoints.save_hf(tmp_path / "base", WIDE, helpers.random_params(WIDE))
    file = tmp_path / "bench.json"
    sizes = ["--batch_size=1", "--input_length=8", "--target_length=2", "--rounds=1"]
    flags = [f"--checkpoint={tmp_path / 'base'}", "--measures=encoder,parts", f"--json={file}"]
    assert cli.main(["bench", *sizes, *flags]) == 130
    assert "**encoder**" in capsys.readouterr().out
    assert json.loads(file.read_text())["encoder"]["parallel adapter"]["ms"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--measures=encodr"], "got 'encodr'; did you mean encoder?"),
        (["--measures=beams"], "without --topology, --measures are of encoder,"),
        (["--measures=parts", "--topology=v5e:2x2"], "with --topology, --measures are of encoder"),
        (["--reductions=3,"], "must be numbers with commas between them, such as 3,5; got '3,'"),
        (["--input_lenght=3"], "did you mean --input_length?"),
        (["--checkpoint=/nowhere/x"], "config.json does not exist: there is no such folder"),
    ],
)
def test_mistakes_are_told_with_what_is_right(flags, said, capsys):
    assert cli.main(["bench", *flags]) in (1, 2)
    assert said in capsys.readouterr().err


def test_rounds_of_what_is_not_timed_are_refused(capsys):
    assert cli.main(["bench", "--topology=v5e:2x2", "--rounds=3"]) != 0
    assert "--rounds is a number of timed runs" in capsys.readouterr().err


def test_unknown_measures_are_refused():
    kwargs = {"batch_size": 1, "input_length": 8, "target_length": 2, "reductions": [2]}
    with pytest.raises(ValueError, match=r"measures\[0\] must be one of .* got 'speed'"):
        bench.measure(WIDE, {}, measures=["speed"], **kwargs)


def test_patches_of_a_random_image_are_numbered_row_by_row():
    batch = bench_programs.random_batch(helpers.TINY_IMAGES, 2, 7, 3)
    ids = batch["encoder_input_tokens"][..., :2]
    expected = [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3], [3, 1]]
    assert ids.tolist() == [expected, expected]


def test_the_decoder_reads_the_targets_a_place_later():
    batch = bench_programs.random_batch(helpers.TINY, 3, 7, 4)
    targets = batch["decoder_target_tokens"]
    np.testing.assert_array_equal(batch["decoder_input_tokens"], helpers.shift_right(targets))
    assert targets.min() >= 2 and batch["decoder_loss_weights"].all()
