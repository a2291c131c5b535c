"""T5X's programs with checkpoints that are not whole: stacked layers, what was trained alone.

Each program takes half a minute.
"""

from pathlib import Path

from helpers import assert_same_tree
import jax
import numpy as np
import pytest
from t5x_programs import LAYERS, coda

from coda_jax import checkpoints, trees
from coda_jax.checkpoints.t5x import read_t5x
from coda_jax.checkpoints.t5x_scanned import to_scanned
from coda_jax.commands.convert import convert
from coda_jax.methods import Coda, ParallelAdapter, partition
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
    "ParallelAdapter.bottleneck": 4,
    "INITIAL_CHECKPOINT_PATH": "base/checkpoint_10",
}
TRAINING = {
    **SHARED,
    "MODEL_DIR": "run",
    "BATCH_SIZE": 8,
    "EVAL_STEPS": 1,
    "EVAL_PERIOD": 2,
    "EVALUATOR_NUM_EXAMPLES": 8,
    "SaveCheckpointConfig.period": 2,
    "SAVE_TRAINED_ONLY": True,
    "REMAT_POLICY": "minimal",
}
RECIPE = ["methods/coda.gin", "tasks/stdlib_module.gin"]


def test_a_run_from_stacked_layers_saves_what_it_trains_and_is_whole_with_its_base(tmp_path):
    params = jax.tree.map(np.asarray, init_params(DENSE, jax.random.key(0)))
    base = checkpoints.save_t5x(tmp_path / "base", to_scanned(DENSE, params), 10)
    for steps in (12, 14):  # the second start reads what the run does not save from its base again
        given = {**TRAINING, "TRAIN_STEPS": steps}
        result = coda(tmp_path, "train", ["t5x/finetune.gin", *RECIPE], given)
        assert result.returncode == 0, result.stderr[-4000:]
        assert "its layers are taken apart" in result.stderr
    saved = read_t5x(tmp_path / "run")[0]
    expected, _ = map(trees.flatten, partition(CODA, init_params(CODA, jax.random.key(0))))
    assert trees.flatten(saved).keys() == expected.keys()

    convert(str(tmp_path / "run"), str(tmp_path / "whole"), "t5x", base=str(base))
    whole = checkpoints.load_t5x(tmp_path / "whole", CODA)
    assert_same_tree(whole, trees.merge(saved, partition(CODA, params)[1]))

    given = {**SHARED, "CHECKPOINT_PATH": "run/checkpoint_14", "SPLIT": "validation"}
    answers = []
    for name in ("run", "whole"):
        given |= {"CHECKPOINT_PATH": f"{name}/checkpoint_14", "INFER_OUTPUT_DIR": f"answers_{name}"}
        result = coda(tmp_path, "infer", ["t5x/infer.gin", *RECIPE], given)
        assert result.returncode == 0, result.stderr[-4000:]
        (file,) = tmp_path.glob(f"answers_{name}/*.jsonl-00000-of-00001")
        answers.append(file.read_bytes())
    assert answers[0] == answers[1]
