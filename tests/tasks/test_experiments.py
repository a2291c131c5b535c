"""The list of the paper's experiments: its table, and every row as `coda train` reads it."""

import pathlib

import gin
import pytest

from coda_jax import cli, models
from coda_jax.commands import loading
from coda_jax.tasks import experiments

ROOT = pathlib.Path(__file__).parents[2]
PATHS = {
    "MODEL_DIR": "run",
    "INITIAL_CHECKPOINT_PATH": "base",
    "VOCABULARY": "bytes",
    "DIRECTORY": "files",
    "TRAIN_STEPS": 100,
}


def test_table_is_the_list():
    """docs/experiments.md is what the command in its head writes."""
    assert (ROOT / "docs/experiments.md").read_text() == experiments.markdown()


def test_names_are_different_and_every_experiment_of_the_paper_is_there():
    names = [experiment.name for experiment in experiments.EXPERIMENTS]
    assert len(set(names)) == len(names) == 76
    assert "mnli t5_1_1_base coda r3" in names
    assert "c4 t5_1_1_xl coda_pretrain r5" in names
    assert "librispeech_other w2v_bert_large coda r2" in names


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS, ids=lambda x: x.name)
def test_every_row_is_parsed_and_instantiated(experiment):
    """Its config, its methods and its options are those that the row names."""
    given = [*experiment.arguments("coda"), *(f"--gin.{k}={v}" for k, v in PATHS.items())]
    options = cli.parse_arguments(["train", *given])
    cli.configure(options.gin_file, options.gin_search_paths, options.gin_bindings)
    config = gin.get_configurable(loading.configured_preset)()
    methods = gin.get_configurable(loading.configured_methods)()
    adapted = config.replace(methods=methods)
    assert config == models.preset(experiment.preset)
    assert [m.reduction for m in adapted.methods if hasattr(m, "reduction")] == (
        [] if experiment.reduction is None else [experiment.reduction]
    )
    lengths = gin.query_parameter("TASK_FEATURE_LENGTHS/macro.value")
    assert set(lengths) == {"inputs", "targets"}
    if experiment.batch_size is not None:
        assert gin.query_parameter("BATCH_SIZE/macro.value") == experiment.batch_size


def test_a_trainer_that_cannot_run_an_experiment_says_so():
    """T5X has no CTC."""
    speech = next(x for x in experiments.EXPERIMENTS if x.inputs == "speech")
    with pytest.raises(ValueError, match=r"trainer 't5x' must be one of \('coda',\)"):
        speech.arguments("t5x")
