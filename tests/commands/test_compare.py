"""`coda compare`: cells, what is kept, what is passed on, and the report."""

import json
import re
import shlex
import shutil

from command_line import coda, flags, letters_task
from helpers import config, random_params
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import bundled, checkpoints, cli, methods, trees
from coda_jax.commands.command_lines import CommandLine, divided
from coda_jax.commands.compare_cells import Cell
from coda_jax.commands.compare_plan import plan
from coda_jax.commands.compare_speed import Timed, dense_of
from coda_jax.commands.gin_files import UsageError
from coda_jax.commands.loading import load_model
from coda_jax.nn.quantized import quantization_of

CONFIG = config(vocab_size=384, num_encoder_layers=1)
FILES = ["runs/compare.gin", "tasks/jsonl.gin"]
RECIPES = {
    "all of it": {"gin_file": "methods/full.gin", "PEAK_LEARNING_RATE": 1e-3},
    "routed, r = 2": {
        "gin_file": "methods/coda.gin",
        "REDUCTION": 2,
        "ParallelAdapter.bottleneck": 4,
    },
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The flags of a comparison on a tiny checkpoint; the task: a word and its first letter."""
    directory = tmp_path_factory.mktemp("compare")
    checkpoints.save_hf(directory / "base", CONFIG, random_params(CONFIG))
    files = letters_task(directory, 12, 6)
    return {
        **files,
        "INITIAL_CHECKPOINT_PATH": directory / "base",
        "VOCABULARY": "bytes",
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
        "BATCH_SIZE": 4,
        "TRAIN_STEPS": 3,
        "RECIPES": RECIPES,
        "TIMED": ((2, 8),),
        "ANSWER_LENGTH": 2,
        "ROUNDS": 1,
    }


@pytest.fixture(scope="module")
def detecting(tmp_path_factory, given):
    """The same flags, with a set out of distribution."""
    others = tmp_path_factory.mktemp("others") / "others.txt"
    others.write_text("12345\n6789\n##\n")
    return given | {"OOD": {"OOD": str(others), "BOOTSTRAP": 2, "NEIGHBOURS": 2}}


@pytest.fixture(scope="module")
def compared(tmp_path_factory, detecting):
    """(folder, report) of two recipes with two seeds."""
    directory = tmp_path_factory.mktemp("compared")
    coda("compare", FILES, detecting | {"MODEL_DIR": directory, "SEEDS": (0, 1)})
    return directory, json.loads((directory / "report.json").read_text())


@pytest.mark.all
def test_a_report_has_quality_sizes_and_speed_of_every_recipe(compared, given):
    directory, report = compared
    assert report["seeds"] == [0, 1]
    assert list(report["recipes"]) == list(RECIPES)
    for name, row in report["recipes"].items():
        scores = [cell["score"] for cell in row["cells"].values()]
        assert row["mean"] == pytest.approx(np.mean(scores))
        assert row["error"] == pytest.approx(np.std(scores, ddof=1) / 2**0.5)
        speed = row["speed"]["2x8"]
        assert speed["encoder_ms"] > 0
        assert speed["train_step_bytes"] > 0
        assert len(speed["end_to_end_speed_up"]["dense model"]) == 3, name
    everything, routed = report["recipes"].values()
    assert everything["trained"] == everything["total"] >= everything["stored"] > 0
    adapter = directory / "routed_r_2" / "0" / "export" / "adapter"
    model = load_model(str(given["INITIAL_CHECKPOINT_PATH"]), adapter_checkpoint=str(adapter))
    trained, _ = methods.partition(model.config, model.params)
    assert routed["trained"] == trees.count(trained) >= routed["stored"] > 0
    assert (
        report["dense"]["speed"]["2x8"]["flops_ratio"] == 1 < routed["speed"]["2x8"]["flops_ratio"]
    )


@pytest.mark.all
def test_a_cell_is_what_its_commands_do(compared, tmp_path):
    """Typed by a person, elsewhere, they give the same leaves and the same metrics."""
    directory, report = compared
    cell = report["recipes"]["routed, r = 2"]["cells"]["1"]
    train = re.sub(r"MODEL_DIR=\S+", f"MODEL_DIR={tmp_path}/run", cell["train"])
    cli.run(_words(train))
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())
    curve = {name: points[-1][1] for name, points in cell["curve"].items()}
    assert again["loss"] == curve["eval/loss"]
    output = tmp_path / "metrics.json"
    cli.run([*_words(cell["evaluate"]), f"--gin.OUTPUT={output}"])
    (metrics,) = json.loads(output.read_text()).values()
    assert metrics == cell["metrics"]
    written = directory / cell["directory"] / "ood.json"
    first = json.loads(written.read_text())
    cli.run(_words(cell["ood"]))
    assert json.loads(written.read_text()) == first


@pytest.mark.all
def test_a_report_has_detection_over_seeds_beside_the_accuracy(compared):
    directory, report = compared
    texts = [(directory / name).read_text() for name in ("report.md", "report.html")]
    for row in report["recipes"].values():
        found = [
            json.loads((directory / cell["directory"] / "ood.json").read_text())
            for cell in row["cells"].values()
        ]
        ((name, of_set),) = row["detection"]["sets"].items()
        assert {"max_softmax", "energy", "encoder_mahalanobis", "decoder_cosine"} <= {*of_set}
        for score, metrics in of_set.items():
            for metric, over_seeds in metrics.items():
                values = [each["sets"][name][score][metric]["value"] for each in found]
                assert over_seeds["mean"] == pytest.approx(np.mean(values))
                assert over_seeds["error"] == pytest.approx(np.std(values, ddof=1) / 2**0.5)
        energy = of_set["energy"]["auroc"]
        for text in texts:
            assert f"Out of distribution: {name}, AUROC" in text
            assert f"{energy['mean']:.3f} ± {energy['error']:.3f}" in text


def _words(command):
    name, *words = shlex.split(command)
    assert name == "coda"
    return words


@pytest.mark.all
def test_what_is_finished_is_kept_and_the_rest_is_done(compared, detecting, tmp_path, capsys):
    directory, report = compared
    copy = shutil.copytree(directory, tmp_path / "x")
    shutil.rmtree(directory / "all_of_it" / "1")
    before = (directory / "all_of_it" / "0" / "score.json").stat().st_mtime_ns
    coda("compare", FILES, detecting | {"MODEL_DIR": directory, "SEEDS": (0, 1), "TIMED": ()})
    said = capsys.readouterr().out
    assert said.count("is finished") == 3
    assert (directory / "all_of_it" / "0" / "score.json").stat().st_mtime_ns == before
    again = json.loads((directory / "report.json").read_text())
    for name, row in again["recipes"].items():
        for seed, cell in row["cells"].items():
            old = report["recipes"][name]["cells"][seed]
            assert cell["metrics"] == old["metrics"]
            assert cell["detection"] == old["detection"]
            assert cell["curve"] == old["curve"]
    assert copy.exists()


@pytest.mark.all
def test_a_folder_of_another_comparison_is_refused(compared, detecting, capsys):
    directory, _ = compared
    own = detecting | {"MODEL_DIR": directory, "SEEDS": (0,)}
    without = {name: value for name, value in own.items() if name != "OOD"}
    for other in (own | {"TRAIN_STEPS": 4}, without):
        assert cli.main(["compare", *flags(FILES, other)]) == 1
        assert "holds what another command found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RECIPES": ()}, "RECIPES must be a tuple of recipes"),
        ({"RECIPES": ("no_such",)}, "there is no gin file 'methods/no_such.gin'"),
        ({"RECIPES": {"a b": {}, "a_b": {}}}, "would share folders"),
        ({"RECIPES": ("lora", "coda", "lora")}, "('lora', 'coda', 'lora') names one twice"),
        ({"RECIPES": {"x": {"gin_file": "methods/full.gin", "STEPS": 3}}}, "nothing reads STEPS"),
        ({"SEEDS": ()}, "SEEDS must be a tuple that is not empty"),
        ({"SEEDS": (0, -1)}, "SEEDS[1] must be a whole number"),
        ({"METRICK": "x"}, "nothing reads METRICK"),
        ({"METRIC": 3}, "METRIC must be a text"),
        ({"TIMED": ((4,),)}, "(TIMED)[0] must be (rows, inputs)"),
        ({"BETTER": "most"}, "BETTER must be one of ('max', 'min')"),
        ({"TRAIN": {"MODEL_DIR": "x"}}, "TRAIN: ['MODEL_DIR']: give SEEDS, and MODEL_DIR of all"),
        ({"TRAIN": 3}, "TRAIN must be flags such as"),
        ({"EVALUATE": "SPLIT"}, "EVALUATE must be flags such as"),
        ({"RECIPES": {"a": {"gin_file": 3}}}, "'gin_file' of a must be a name of a file"),
        ({"BASELINES": 3}, "BASELINES must be {name: a metric}"),
        ({"BASELINES": {"a": "x"}}, "BASELINES['a'] must be a number"),
        ({"SEED": 5}, "the command: ['SEED']: give SEEDS"),
        ({"EVALUATE": {"INITIAL_ADAPTER_PATH": "x"}}, "each cell evaluates what it has trained"),
        (
            {"OOD": {"SPLIT": "test"}},
            "OOD must be flags of `coda ood` with sets out of distribution",
        ),
        ({"OOD": {"OOD": "x.txt", "OUTPUT": "y"}}, "OOD: ['OUTPUT']: each cell has its own model"),
        ({"OOD": {"OOD": "x.txt", "NEIGHBORS": 3}}, "nothing reads NEIGHBORS"),
        ({"EVALUATE": {"SPLIT": "tset"}}, "all of it: jsonl_train_validation has no split 'tset'"),
        ({"VALIDATION_FILE": None}, "all of it: jsonl_train has no split but 'train'"),
        (
            {"RECIPES": ("lora", "structured_pruning")},
            "structured_pruning: 'structured_pruning' changes the model until step",
        ),
        (
            {"RECIPES": {"a": {"gin_file": "methods/lora.gin", "RANK": 1000}}},
            "a: Lora.rank (RANK)=1000 is above the width",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(given, tmp_path, capsys, changes, message):
    target = tmp_path / "none"
    assert cli.main(["compare", *flags(FILES, given | {"MODEL_DIR": target} | changes)]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_a_metric_that_the_task_lacks_is_told_by_the_first_cell(
    given, tmp_path, capsys, monkeypatch
):
    ran = []
    found = {"metrics": {"accuracy": 50.0}}
    monkeypatch.setattr(Cell, "run", lambda cell: ran.append(cell.recipe) or found)
    asked = given | {"MODEL_DIR": tmp_path / "asked", "METRIC": "acuracy"}
    assert cli.main(["compare", *flags(FILES, asked)]) == 1
    assert "METRIC must be one of" in capsys.readouterr().err
    assert ran == ["all of it"]


def test_before_training_the_task_is_looked_up_with_the_checkpoints_own_vocabulary(given, tmp_path):
    own = {name: str(given[name]) for name in ("TRAIN_FILE", "VALIDATION_FILE")}
    cell, _ = plan_of(tmp_path, own | {"INITIAL_CHECKPOINT_PATH": str(bundled.DENSE)})
    cell.rehearse()


def test_flags_are_divided_by_who_reads_them():
    bindings = ["MODEL_DIR=x", "SEEDS=(0,)", "TRAIN_STEPS=5", "train/Data.pack=True"]
    own, others = divided("compare", FILES, [], bindings)
    assert own == (["runs/compare.gin"], [], ["MODEL_DIR=x", "SEEDS=(0,)"])
    assert others == CommandLine(
        ("tasks/jsonl.gin",), (), {"TRAIN_STEPS": "5", "train/Data.pack": "True"}
    )
    with pytest.raises(UsageError, match="TRAIN_STEPS is given twice: 5 and 6"):
        divided("compare", FILES, [], ["TRAIN_STEPS=5", "TRAIN_STEPS=6"])


def test_a_line_is_written_as_a_person_types_it():
    line = CommandLine(("a.gin",)).plus({"gin_file": "b.gin", "X": {"y": 1}, "PATH": "it's here"})
    assert line.text("train") == (
        "coda train --gin_file=a.gin --gin_file=b.gin '--gin.X={'\"'\"'y'\"'\"': 1}' "
        "'--gin.PATH=it'\"'\"'s here'"
    )


def test_timed_batches_are_pairs_of_counts():
    assert Timed(((2, 8), [4, 16])).batches == ((2, 8), (4, 16))
    with pytest.raises(ValueError, match=r"Timed.batches\[0\]\[1\] must be a whole number"):
        Timed(((2, 0),))


def test_speeds_are_over_a_dense_model_in_float32_where_a_recipe_is(given):
    def model(**options):
        folder = str(given["INITIAL_CHECKPOINT_PATH"])
        return load_model(folder, methods=(methods.Lora(2),), **options)

    int8, half, exact = model(quantize="int8"), model(dtype="bfloat16"), model()
    dense = dense_of([int8, half, exact])
    assert dense.config.dtype == np.float32 and quantization_of(dense.params) is None
    assert dense_of([half, int8]).config.dtype == jnp.bfloat16


def plan_of(tmp_path, given, recipes=("full",), training=None, evaluation=None, files=()):
    line = CommandLine(("tasks/jsonl.gin", *files), (), given)
    return plan(tmp_path, recipes, (0, 1), line, training or {}, evaluation or {})


def test_a_recipe_goes_before_the_command_and_the_command_before_what_all_share(tmp_path):
    given = {
        "INITIAL_CHECKPOINT_PATH": "base",
        "REDUCTION": "3",
        "TRAIN_FILE": "x",
        "BATCH_SIZE": "8",
    }
    recipes = {"r5": {"gin_file": "methods/coda.gin", "REDUCTION": 5, "DTYPE": "bfloat16"}}
    training = {"BATCH_SIZE": 2, "TRAIN_STEPS": 7}
    evaluation = {"BATCH_SIZE": 64}
    cell, _ = plan_of(tmp_path, given, recipes, training, evaluation)
    expected = {"BATCH_SIZE": "8", "TRAIN_STEPS": "7", "REDUCTION": "5"}
    assert {name: cell.training.bindings[name] for name in expected} == expected
    assert cell.evaluation.bindings == {
        "REDUCTION": "5",
        "TRAIN_FILE": "x",
        "BATCH_SIZE": "64",
        "DTYPE": "bfloat16",
    }


def test_texts_know_the_seed_and_the_folder(tmp_path):
    given = {"INITIAL_CHECKPOINT_PATH": "{directory}/r/{seed}", "TRAIN_FILE": "x"}
    cells = plan_of(tmp_path, given)
    found = [cell.training.bindings["INITIAL_CHECKPOINT_PATH"] for cell in cells]
    assert found == [f"{tmp_path}/r/{seed}" for seed in (0, 1)]


def test_a_file_of_ones_own_serves_both_commands_or_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="full: INITIAL_CHECKPOINT_PATH must be given"):
        plan_of(tmp_path, {"TRAIN_FILE": "x"})
    own, given = tmp_path / "own.gin", {"INITIAL_CHECKPOINT_PATH": "base", "TRAIN_FILE": "x"}
    for text, in_evaluation in (("VALIDATION_FILE = 'y'\n", True), ("ACCUMULATION = 2\n", False)):
        own.write_text(text)
        cell, _ = plan_of(tmp_path, given, files=(str(own),))
        assert str(own) in cell.training.gin_files
        assert (str(own) in cell.evaluation.gin_files) == in_evaluation
    own.write_text("VALIDATION_FILE = 'y'\nACCUMULATION = 2\n")
    with pytest.raises(UsageError, match=r"own.gin binds \['VALIDATION_FILE'\], which"):
        plan_of(tmp_path, given, files=(str(own),))


@pytest.mark.all
def test_answers_are_not_judged_on_what_was_trained_on(given, tmp_path, capsys):
    own = {name: x for name, x in given.items() if name != "VALIDATION_FILE"}
    own |= {"RECIPES": ("norms",), "SEEDS": (0,), "MODEL_DIR": tmp_path, "TIMED": ()}
    assert cli.main(["compare", *flags(FILES, own | {"TRAIN_STEPS": 1})]) == 1
    assert "has no split but 'train': name other examples" in capsys.readouterr().err


def test_one_recipe_is_trained_judged_and_kept(given, tmp_path, capsys):
    own = {"RECIPES": ("norms",), "SEEDS": (0,), "MODEL_DIR": tmp_path, "TIMED": ()}
    coda("compare", FILES, given | own)
    report = json.loads((tmp_path / "report.json").read_text())
    (row,) = report["recipes"].values()
    assert row["mean"] == row["cells"]["0"]["score"] and row["error"] is None
    assert 0 < row["trained"] < row["total"]
    assert [step for step, _ in row["cells"]["0"]["curve"]["loss"]] == [3]
    assert (tmp_path / "report.html").read_text().startswith("<!")
    capsys.readouterr()
    coda("compare", FILES, given | own)
    assert "is finished" in capsys.readouterr().out
    assert cli.main(["compare", *flags(FILES, given | own | {"TRAIN_STEPS": 4})]) == 1
    assert "holds what another command found" in capsys.readouterr().err
