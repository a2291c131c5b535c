"""The commands for speech: a tiny encoder without a head learns from a folder of recordings."""

import json
from pathlib import Path
import shutil

import captcha
from command_line import coda
from helpers import TINY_SPEECH, assert_same_tree, config, random_params
import numpy as np
import pytest

from coda_jax import checkpoints, trees
from coda_jax.commands.convert import convert
from coda_jax.methods import Coda, ParallelAdapter, created, partition
from coda_jax.tasks import metrics

CONFIG = config(base=TINY_SPEECH, vocab_size=0, feature_dim=160, conv_width=5, num_encoder_layers=1)
SIZES = ("emb_dim", "num_heads", "num_encoder_layers", "head_dim", "mlp_dim", "conv_width")
SIZES += ("max_left_distance", "max_right_distance")
HEAD = {  # what `load_model` needs to know of the new one, beside the checkpoint's own sizes
    "PRESET": "w2v_bert_tiny",
    "PRESET_CHANGES": {name: getattr(CONFIG, name) for name in SIZES},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """captcha's recordings of letters and digits, with what they say."""
    folder = tmp_path_factory.mktemp("recordings")
    clips = sorted((Path(captcha.__file__).parent / "data").glob("?/*.wav"))
    for split, chosen in (("train", clips[::3]), ("validation", clips[1::6])):
        rows = ["path\tsentence"]
        for clip in chosen:
            shutil.copy(clip, folder / f"{clip.parent.name}.wav")
            rows.append(f"{clip.parent.name}.wav\t{clip.parent.name}")
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny w2v-BERT without a head."""
    directory = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save_hf(directory, CONFIG, random_params(CONFIG))
    return directory


@pytest.fixture(scope="module")
def shared(checkpoint, folder):
    """What the commands share."""
    return {
        "DIRECTORY": folder,
        "INITIAL_CHECKPOINT_PATH": checkpoint,
        "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 4},
        "BATCH_SIZE": 4,
    }


def train(files, directory, bindings):
    """Runs `coda train` with adapters of bottleneck 4."""
    given = {"MODEL_DIR": directory, "ParallelAdapter.bottleneck": 4}
    coda("train", [*files, "tasks/audio_folder.gin"], bindings | given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared):
    """A run of `coda train` with CoDA and a CTC head for bytes."""
    directory = tmp_path_factory.mktemp("run")
    files = ["runs/finetune.gin", "methods/coda.gin"]
    train(files, directory, shared | HEAD | {"TRAIN_STEPS": 24})
    return directory


def test_train_exports_an_adapter_with_the_new_head(trained, checkpoint):
    dense, base = checkpoints.load_hf(checkpoint)
    cfg, params = checkpoints.load_adapter(trained / "export" / "adapter", dense, base)
    assert cfg.methods == (Coda(reduction=3), ParallelAdapter(bottleneck=4))
    assert "ctc_head" not in base and params["ctc_head"]["kernel"].shape == (16, 384)
    assert (dense.vocab_size, cfg.vocab_size) == (0, 384)


@pytest.mark.all
def test_evaluate_and_predict_agree(trained, checkpoint, folder, shared, tmp_path):
    """The error rates of `coda evaluate` are those of what `coda predict` writes."""
    decoding = {
        "INITIAL_ADAPTER_PATH": trained / "export" / "adapter",
        "Decoding.max_decode_length": 4,
    }
    given = shared | decoding | {"OUTPUT": tmp_path / "metrics.json"}
    coda("evaluate", ["runs/evaluate.gin", "tasks/audio_folder.gin"], given)
    (found,) = json.loads((tmp_path / "metrics.json").read_text()).values()
    rows = [line.split("\t") for line in (folder / "validation.tsv").read_text().splitlines()[1:]]
    (tmp_path / "in.txt").write_text("\n".join(str(folder / path) for path, _ in rows) + "\n")
    given = decoding | {
        "INITIAL_CHECKPOINT_PATH": checkpoint,
        "BATCH_SIZE": 4,
        "VOCABULARY": "bytes",
        "INPUT": tmp_path / "in.txt",
        "OUTPUT": tmp_path / "out.jsonl",
        "Decoding.max_input_length": 64,
    }
    coda("predict", ["runs/predict.gin"], given)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    predictions = [line["prediction"].strip() for line in lines]
    targets = [text.lower() for _, text in rows]  # as the task has them
    assert metrics.transcript_errors(targets, predictions) == found


@pytest.mark.all
def test_best_rq_pretrains_an_encoder_that_is_then_adapted_with_a_head(
    checkpoint, shared, tmp_path
):
    """From a checkpoint without a head to one without a head, and from there to CTC."""
    pretrained, adapted = tmp_path / "pretrained", tmp_path / "adapted"
    short = {"TRAIN_STEPS": 3, "warmup_cosine.warmup_steps": 1}
    best_rq = {"NUM_CODES": 11, "BestRQConfig.start_probability": 0.2}
    train(["runs/pretrain_best_rq_coda.gin"], pretrained, shared | short | best_rq)
    dense, params = checkpoints.load_hf(pretrained / "export")
    _, before = checkpoints.load_hf(checkpoint)
    assert dense.vocab_size == 0 and params.keys() == before.keys() == {"encoder"}
    before, after = trees.flatten(before), trees.flatten(params)
    assert all((leaf != after[path]).any() for path, leaf in before.items())
    cfg, params = checkpoints.load_adapter(pretrained / "export" / "adapter", dense, params)
    assert cfg.methods == (Coda(reduction=2), ParallelAdapter(bottleneck=4))
    assert params.keys() == {"encoder"}
    convert(str(pretrained), str(tmp_path / "same"), "adapter")
    assert_same_tree(checkpoints.load_adapter(tmp_path / "same", dense, params)[1], params)

    again = {
        "INITIAL_CHECKPOINT_PATH": pretrained / "export",
        "INITIAL_ADAPTER_PATH": pretrained / "export" / "adapter",
        "REDUCTION": 2,
    }
    files = ["runs/finetune.gin", "methods/coda.gin"]
    train(files, adapted, shared | HEAD | short | again)
    _, base = trees.split(params, created(cfg))
    new, found = checkpoints.load_adapter(adapted / "export" / "adapter", dense, base)
    assert new.vocab_size == 384 and found["ctc_head"]["kernel"].shape == (16, 384)
    for path, leaf in trees.flatten(partition(cfg, params)[1]).items():
        np.testing.assert_array_equal(leaf, trees.flatten(found)[path])
