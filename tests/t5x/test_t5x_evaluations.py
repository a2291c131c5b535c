"""What T5X does with the checkpoints of a run: it keeps the best, and evaluates all of them.

Run with T5X's checkout on PYTHONPATH (`make test-t5x`); each program takes a minute.
"""

import json

import pytest
from t5x_programs import FINETUNE_FILES, METHOD, finetune, logged, run, write_model

pytest.importorskip(
    "t5x.models", reason="T5X is not installed: make test-t5x T5X_PATH=...", exc_type=ImportError
)
pytestmark = pytest.mark.all

FIRST, PERIOD, LAST = 2, 3, 17


@pytest.fixture(name="trained", scope="module")
def fixture_trained(tmp_path_factory):
    """The folder of a run that keeps the best checkpoint by its loss, beside its gin files."""
    folder = tmp_path_factory.mktemp("t5x")
    bindings = finetune(write_model(folder, FIRST), folder / "run", TRAIN_STEPS=str(LAST))
    del bindings["SaveCheckpointConfig.period"]  # that of the evaluations
    bindings |= {
        "EVAL_PERIOD": str(PERIOD),
        "BEST_METRIC": "'training_eval/stdlib_module/loss'",
        "BEST_MODE": "'min'",
        "train.infer_eval_dataset_cfg": "None",
        "utils.create_learning_rate_scheduler.base_learning_rate": "0.1",
    }
    run("train", [*FINETUNE_FILES, "t5x/keep_best.gin"], bindings, folder)
    return folder / "run"


def kept(directory):
    return sorted(int(path.name.split("_")[1]) for path in directory.glob("checkpoint_*"))


def test_the_best_checkpoint_is_kept_beside_the_newest(trained):
    """The first one has no evaluation, and T5X keeps those."""
    losses = logged(trained / "training_eval" / "stdlib_module", "loss")
    assert [*losses] == [*range(FIRST + PERIOD, LAST + 1, PERIOD)]
    best = min(list(losses)[:-1], key=losses.get)  # of those before the newest
    assert kept(trained) == [FIRST, best, LAST]


def test_an_evaluation_of_a_folder_takes_what_it_has_not_seen(trained):
    output = trained.parent / "evaluation"
    bindings = finetune("", "")
    names = ("MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS", "VOCABULARY", "DTYPE")
    bindings = {name: bindings[name] for name in (*names, "ParallelAdapter.bottleneck")}
    bindings |= {
        "Coda.max_segments": "8",
        "CHECKPOINT_PATH": f"'{trained}'",
        "EVAL_OUTPUT_DIR": f"'{output}'",
        "RestoreCheckpointConfig.mode": "'all'",
        "seqio.Evaluator.num_examples": "8",
    }
    steps, newest = kept(trained), trained / f"checkpoint_{LAST}"
    newest.rename(trained.parent / "later")
    for evaluated in (steps[:-1], steps, steps):
        run("eval", ["t5x/eval.gin", "ours.gin", *METHOD], bindings, trained.parent)
        (file,) = output.glob("inference_eval/*-metrics.jsonl")
        lines = file.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == evaluated
        if not newest.exists():
            (trained.parent / "later").rename(newest)
