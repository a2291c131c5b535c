"""Conditional pretraining with T5X, on texts of one's own."""

from pathlib import Path
import shutil
import sysconfig

import jax
import pytest
from t5x_programs import LAYERS, VOCABULARY, coda

from coda_jax import checkpoints, trees
from coda_jax.checkpoints.t5x import read_t5x
from coda_jax.models import init_params, preset

# Not "t5x": this folder of tests would be found under that name.
pytest.importorskip(
    "t5x.models", reason="T5X is not installed: make test-t5x T5X_PATH=...", exc_type=ImportError
)

FILES = ["t5x/pretrain.gin", "methods/coda_pretrain.gin", "tasks/pretrain_text.gin"]


@pytest.mark.parametrize("denoisers", ["span_corruption", "ul2"])
def test_a_dense_model_is_pretrained_on_a_folder_of_texts(denoisers, tmp_path):
    (tmp_path / "texts").mkdir()
    for path in Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"):
        shutil.copy(path, tmp_path / "texts")
    config = preset("t5_1_1_stdlib", **LAYERS)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    checkpoints.save_t5x(tmp_path / "dense", params, 10)
    given = {
        "TEXTS": tmp_path / "texts",
        "DENOISERS": denoisers,
        "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 64},
        "PRESET": "t5_1_1_stdlib",
        "PRESET_CHANGES": LAYERS,
        "VOCABULARY": VOCABULARY,
        "MODEL_DIR": "run",
        "INITIAL_CHECKPOINT_PATH": "dense/checkpoint_10",
        "TRAIN_STEPS": 13,
        "BATCH_SIZE": 8,
        "EVAL_STEPS": 1,
        "EVAL_PERIOD": 3,
        "EVALUATOR_NUM_EXAMPLES": 8,
        "SaveCheckpointConfig.period": 3,
        "ParallelAdapter.bottleneck": 4,
        "Coda.max_segments": 4,
    }
    result = coda(tmp_path, "train", FILES, given)
    assert result.returncode == 0, result.stderr[-4000:]
    before, (after, step) = trees.flatten(params), read_t5x(tmp_path / "run")
    after = trees.flatten(after)
    assert step == 13 and all((leaf != after[path]).any() for path, leaf in before.items())
