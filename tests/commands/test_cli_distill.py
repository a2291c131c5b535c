"""`coda train` with a teacher, and over several reductions: a tiny model of bytes."""

import json
from pathlib import Path
import shutil

import captcha
from command_line import coda, flags
from helpers import TINY_SPEECH, config, random_params
import numpy as np
import pytest

from coda_jax import checkpoints, cli

CONFIG = config(vocab_size=384, num_encoder_layers=1)
FILES = ["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A checkpoint of random weights, and a task: a word and its first letter."""
    folder = tmp_path_factory.mktemp("shared")
    checkpoints.save_hf(folder / "base", CONFIG, random_params(CONFIG))
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), 5)) for _ in range(24)]
    lines = [json.dumps({"inputs": word, "targets": word[0]}) for word in words]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "TRAIN_FILE": folder / "train.jsonl",
        "INITIAL_CHECKPOINT_PATH": folder / "base",
        "VOCABULARY": "bytes",
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
        "BATCH_SIZE": 4,
        "ACCUMULATION": 2,
        "ParallelAdapter.bottleneck": 4,
    }


@pytest.fixture(scope="module")
def teacher(shared, tmp_path_factory):
    """The folder of a parallel adapter of the checkpoint."""
    folder = tmp_path_factory.mktemp("teacher")
    files = [FILES[0], "methods/parallel_adapter.gin", FILES[2]]
    coda("train", files, shared | {"MODEL_DIR": folder, "TRAIN_STEPS": 8})
    return folder / "export" / "adapter"


def test_a_student_follows_the_adapter_of_its_teacher(shared, teacher, tmp_path, capsys):
    given = {"MODEL_DIR": tmp_path, "TRAIN_STEPS": 4, "DISTILL": 0.5, "DISTILL_TEMPERATURE": 2}
    given |= {"TEACHER_ADAPTER_PATH": teacher, "REDUCTIONS": (1, 2), "EPSILON_START": 4}
    coda("train", FILES, shared | given)
    assert "teacher: its pass over a batch takes " in capsys.readouterr().out
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["distillation"]["weight"] == 0.5 and run["options"]["reductions"] == [1, 2]
    assert str(teacher) not in json.dumps(run)  # what it is counts, not where it lies
    base = checkpoints.load_hf(shared["INITIAL_CHECKPOINT_PATH"])
    cfg, _ = checkpoints.load_adapter(tmp_path / "export" / "adapter", *base)
    assert [method.name for method in cfg.methods] == ["coda", "parallel_adapter"]


def test_the_base_alone_teaches_pretraining_with_all_parameters(shared, tmp_path):
    files = [FILES[0], "methods/coda_pretrain.gin", FILES[2]]
    given = {"MODEL_DIR": tmp_path, "TRAIN_STEPS": 2, "DISTILL": 1, "REDUCTION": 2}
    coda("train", files, shared | given)
    checkpoints.load_hf(tmp_path / "export")


@pytest.mark.all
def test_the_answers_of_a_teacher_are_targets_where_there_are_none(shared, teacher, tmp_path):
    inputs, answers = tmp_path / "inputs.jsonl", tmp_path / "answers.jsonl"
    inputs.write_text('{"inputs": "abc"}\n{"inputs": "fed"}\n')
    asked = {"INPUT": inputs, "OUTPUT": answers, "INITIAL_ADAPTER_PATH": teacher}
    asked |= {name: shared[name] for name in ("INITIAL_CHECKPOINT_PATH", "VOCABULARY")}
    coda("predict", ["runs/predict.gin"], asked | {"Decoding.max_decode_length": 4})
    given = {"TRAIN_FILE": answers, "TARGET_FIELD": "prediction", "DISTILL": 1}
    given |= {"TEACHER_ADAPTER_PATH": teacher, "MODEL_DIR": tmp_path / "run", "TRAIN_STEPS": 2}
    coda("train", FILES, shared | given | {"ACCUMULATION": 1, "BATCH_SIZE": 2})
    assert (tmp_path / "run" / "export" / "adapter").exists()


def test_recordings_without_transcripts_are_enough_for_a_ctc_head(tmp_path, capsys):
    for clip in sorted((Path(captcha.__file__).parent / "data").glob("?/*.wav")):
        (tmp_path / "clips" / clip.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / "clips" / clip.parent.name)
    sizes = {"vocab_size": 384, "feature_dim": 160, "conv_width": 5, "num_encoder_layers": 1}
    speech = config(base=TINY_SPEECH, **sizes)
    checkpoints.save_hf(tmp_path / "base", speech, random_params(speech))
    given = {"RECORDINGS": tmp_path / "clips", "INITIAL_CHECKPOINT_PATH": tmp_path / "base"}
    given |= {"MODEL_DIR": tmp_path / "run", "TRAIN_STEPS": 2, "BATCH_SIZE": 4, "DISTILL": 1}
    given |= {"TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 1}, "EVAL_TASK_NAME": None}
    files = ["runs/finetune.gin", "methods/coda.gin", "tasks/audio_files.gin"]
    assert cli.main(["train", *flags(files, given | {"DISTILL": 0.5})]) == 1
    assert "the targets of the first 16 examples are empty" in capsys.readouterr().err
    coda("train", files, given)
    assert (tmp_path / "run" / "export" / "adapter").exists()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["vocabulary"] is None  # no transcript was read


def test_a_base_without_a_head_is_no_teacher_of_labels(shared, tmp_path, capsys):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"inputs": "{x}", "label": "{x[0]}"}}\n' for x in ("ab", "ba")))
    files = [*FILES[:2], "tasks/labels.gin"]
    said = refused(shared, tmp_path, capsys, files=files, TRAIN_FILE=file, DISTILL=0.5)
    assert "the student has the head ['classification', ('a', 'b'), 'mean'], the teacher" in said
    assert "TEACHER_ADAPTER_PATH must name an adapter of the same task" in said


def refused(shared, tmp_path, capsys, files=FILES, **given):
    """What `coda train` says of values that it refuses."""
    given = shared | {"MODEL_DIR": tmp_path / "run", "TRAIN_STEPS": 2} | given
    assert cli.main(["train", *flags(files, given)]) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
    return capsys.readouterr().err


def test_mistakes_are_told_in_a_line(shared, teacher, tmp_path, capsys):
    said = refused(shared, tmp_path, capsys, TEACHER_ADAPTER_PATH=teacher)
    assert "has no effect without DISTILL, the weight of the teacher" in said
    said = refused(shared, tmp_path, capsys, DISTILL_TEMPERATURE=2)
    assert "DISTILL_TEMPERATURE=2 has no effect without DISTILL" in said
    said = refused(shared, tmp_path, capsys, DISTILL=2)
    assert "Distillation.weight must be a number above 0 and at most 1, got 2" in said
    other = tmp_path / "base"
    checkpoints.save_hf(other, CONFIG, random_params(CONFIG, seed=1))
    changed = {"INITIAL_CHECKPOINT_PATH": other, "DISTILL": 0.5, "TEACHER_ADAPTER_PATH": teacher}
    assert "belongs to another base" in refused(shared, tmp_path, capsys, **changed)
