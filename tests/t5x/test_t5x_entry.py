"""`coda t5x` with T5X: a run from a checkpoint to answers, and mistakes, each in a few lines.

The table of mistakes in docs/t5x.md is what is printed by
`python -m pytest -m "" -n 0 -s tests/t5x/test_t5x_entry.py`.
"""

import json
from pathlib import Path
import re
import shutil
import time

from helpers import GOLDEN, unpack
import jax
import numpy as np
import pytest
from t5x_programs import LAYERS, coda

from coda_jax import checkpoints, methods, trees
from coda_jax.checkpoints.t5x import read_t5x
from coda_jax.checkpoints.t5x_record import run_folder, write_record
from coda_jax.methods import Coda, ParallelAdapter
from coda_jax.models import init_params, preset
from coda_jax.tasks import offline

# Not "t5x": this folder of tests would be found under that name.
pytest.importorskip(
    "t5x.models", reason="T5X is not installed: make test-t5x T5X_PATH=...", exc_type=ImportError
)

DENSE = preset("t5_1_1_stdlib", **LAYERS)
CODA = DENSE.replace(methods=(Coda(3), ParallelAdapter(bottleneck=4)))
SHARED = {
    "PRESET": "t5_1_1_stdlib",
    "PRESET_CHANGES": LAYERS,
    "VOCABULARY": Path(offline.VOCABULARY_FILE).parent,
    "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 16},
    "BATCH_SIZE": 8,
}
TRAINING = {
    **SHARED,
    "MODEL_DIR": "run",
    "INITIAL_CHECKPOINT_PATH": "dense/checkpoint_10",
    "TRAIN_STEPS": 12,
    "EVAL_STEPS": 1,
    "EVAL_PERIOD": 2,
    "EVALUATOR_NUM_EXAMPLES": 8,
    "RANDOM_SEED": 0,
    "SaveCheckpointConfig.period": 2,
}
ADAPTER = {"ParallelAdapter.bottleneck": 4}
FILES = ["t5x/finetune.gin", "methods/coda.gin", "tasks/stdlib_module.gin"]
FULL = [FILES[0], "methods/full.gin", FILES[2]]


def save(folder, cfg, drop=(), step=10):
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    flat = {x: np.asarray(leaf) for x, leaf in trees.flatten(params).items() if x not in drop}
    checkpoints.save_t5x(folder, trees.unflatten(flat), step)
    return params


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
    """A folder with checkpoints of step 10."""
    folder = tmp_path_factory.mktemp("entry")
    save(folder / "dense", DENSE)
    save(folder / "adapted", CODA)
    write_record(run_folder(folder / "adapted"), CODA)
    save(folder / "partly", CODA, drop=("encoder/layers_1/router/kernel",))
    unpack("t5x/scanned", folder / "scanned")
    return folder


def test_a_dense_model_is_trained_resumed_evaluated_and_answers(folder, tmp_path):
    """All of it is trained, the baseline of every adaptation; relative paths will do."""
    shutil.copytree(folder / "dense", tmp_path / "dense")
    given = {k: v for k, v in TRAINING.items() if k != "TRAIN_STEPS"}
    result = coda(tmp_path, "train", FULL, {**given, "TRAIN_STEPS": 12})
    assert result.returncode == 0, result.stderr[-4000:]
    assert "dense/checkpoint_10 is a checkpoint of the whole model" in result.stderr
    assert "Gin Configuration" not in result.stderr
    before, after = (trees.flatten(read_t5x(tmp_path / x)[0]) for x in ("dense", "run"))
    assert all((leaf != before[path]).any() for path, leaf in after.items() if leaf.size > 64)

    shutil.rmtree(tmp_path / "dense")  # T5X goes on in MODEL_DIR
    result = coda(tmp_path, "train", FULL[::-1], {**given, "TRAIN_STEPS": 14})
    assert result.returncode == 0, result.stderr[-4000:]
    assert read_t5x(tmp_path / "run")[1] == 14

    given = {**SHARED, "CHECKPOINT_PATH": "run/checkpoint_14"}
    del given["BATCH_SIZE"]
    for program, output in (("eval", "EVAL_OUTPUT_DIR"), ("infer", "INFER_OUTPUT_DIR")):
        bindings = {**given, output: program, "SPLIT": "validation"}
        result = coda(tmp_path, program, [f"t5x/{program}.gin", *FULL[1:]], bindings)
        assert result.returncode == 0, result.stderr[-4000:]
    (file,) = tmp_path.glob("infer/*.jsonl-00000-of-00001")
    assert len([json.loads(line)["prediction"] for line in file.read_text().splitlines()]) > 100
    assert list(tmp_path.glob("eval/inference_eval/*-metrics.jsonl"))


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("dense", "is a dense checkpoint, and the leaves of coda, parallel_adapter start anew"),
        ("adapted", "is an adapted checkpoint (r = 3), and the leaves of coda, parallel_adapter"),
    ],
)
def test_what_a_checkpoint_has_is_restored_and_said(checkpoint, said, folder, tmp_path):
    path = folder / checkpoint / "checkpoint_10"
    given = {**TRAINING, **ADAPTER, "INITIAL_CHECKPOINT_PATH": path}
    result = coda(tmp_path, "train", FILES, given)
    assert result.returncode == 0, result.stderr[-4000:]
    (line,) = [line for line in result.stderr.splitlines() if said in line]
    assert str(path) in line
    before, after = read_t5x(path)[0], read_t5x(tmp_path / "run")[0]
    trained, frozen = map(trees.flatten, methods.partition(CODA, after))
    flat = trees.flatten(before)
    assert all(leaf.tobytes() == flat[name].tobytes() for name, leaf in frozen.items())
    for name, leaf in trained.items():  # two steps at 0.001 do not lead far
        assert name not in flat or np.abs(leaf - flat[name]).max() < 0.01, name
    assert {name for name in trained if name not in flat} == (
        set() if checkpoint == "adapted" else {x for x in trained if "norm" not in x}
    )


# {mistake: (files, what else is given, what is said)}
MISTAKES = {
    "no preset": (FILES, {"PRESET": None, "PRESET_CHANGES": None}, "give a PRESET"),
    "a run": (FILES, {"INITIAL_CHECKPOINT_PATH": "dense"}, "dense/checkpoint_10, the newest in it"),
    "nothing": (FILES, {"INITIAL_CHECKPOINT_PATH": "none"}, "/none: there is no such folder"),
    "hf": (FILES, {"INITIAL_CHECKPOINT_PATH": GOLDEN / "v1_1"}, "LAYOUT='t5x' makes it T5X's"),
    "steps": (FILES, {"TRAIN_STEPS": 10}, "for 1000 more give 1010"),
    "dense": (FILES, {"NEW_LEAVES": "restored"}, "is a dense checkpoint: it has none of the"),
    "adapted": (
        FILES,
        {"INITIAL_CHECKPOINT_PATH": "adapted/checkpoint_10", "NEW_LEAVES": "created"},
        "is an adapted checkpoint: it has ",
    ),
    "adapted, full": (
        FULL,
        {"INITIAL_CHECKPOINT_PATH": "adapted/checkpoint_10"},
        "was adapted with ['coda', 'parallel_adapter']: METHODS=('full',) does not use",
    ),
    "partly": (
        FILES,
        {"INITIAL_CHECKPOINT_PATH": "partly/checkpoint_10"},
        "missing: encoder/layers_1/router/kernel",
    ),
    "another run": (FULL, {"MODEL_DIR": "adapted"}, "adapted holds a run with other settings"),
    "vocabulary": (FILES, {"VOCABULARY": "bytes"}, "has another vocabulary for its inputs than"),
    "task": (
        [*FILES[:2]],
        {"MIXTURE_OR_TASK_NAME": "no_task"},
        "no task or mixture 'no_task' is registered",
    ),
    "images": (
        FILES,
        {"PRESET": "pix2struct_tiny", "PRESET_CHANGES": None},
        "give --gin_file=t5x/images.gin",
    ),
    "speech": (
        FILES,
        {"PRESET": "w2v_bert_tiny", "PRESET_CHANGES": None},
        "give --gin_file=t5x/speech.gin",
    ),
    "parameter": (FILES, {"Coda.reducton": 4}, "doesn't have a parameter named 'reducton'"),
    "recipes": ([*FILES, "methods/full.gin"], {}, "two recipes in one command"),
    "misspelt": (FILES, {"REDUCTON": 5}, "nothing reads REDUCTON; did you mean REDUCTION"),
}
OFTEN = ("a run", "another run", "vocabulary")  # the others in `make test-all`


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in OFTEN else pytest.mark.all) for x in MISTAKES]
)
def test_a_mistake_is_told_in_three_lines_before_anything_is_built(name, folder):
    files, changes, message = MISTAKES[name]
    adapter = ADAPTER if "methods/coda.gin" in files else {}
    given = {**TRAINING, "MODEL_DIR": "fresh", **adapter, **changes}
    start = time.monotonic()
    result = coda(folder, "train", files, given)
    seconds = time.monotonic() - start
    assert result.returncode in (1, 2) and message in result.stderr, result.stderr[-4000:]
    plain = [x for x in result.stderr.splitlines() if not x.startswith("coda t5x:   ")]
    assert len(plain) <= 3 and not result.stdout, result.stderr
    assert not (folder / "fresh").exists()
    told = re.sub(r"/\S*/", "", max(plain, key=len))
    print(f"\n| {name} | {seconds:.1f} | {len(result.stderr.splitlines())} | {told} |")
