"""The commands for texts: train, evaluate, predict and cache of a tiny model of bytes."""

import json
import re
import shutil

from command_line import coda, flags, letters_task
from helpers import ADAPTER, config, method_of, random_params
import numpy as np
import pytest

from coda_jax import checkpoints, cli
from coda_jax.commands.loading import load_model
from coda_jax.data.cache import read_cache
from coda_jax.data.source import Data
from coda_jax.methods import Coda, ParallelAdapter
from coda_jax.training.metrics_file import read_metrics

CONFIG = config(vocab_size=384, num_encoder_layers=1)
LENGTHS = {"inputs": 8, "targets": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny dense checkpoint of bytes."""
    directory = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save_hf(directory, CONFIG, random_params(CONFIG))
    return directory


@pytest.fixture(scope="module")
def shared(tmp_path_factory, checkpoint):
    """What the commands share; the task: a word and its first letter."""
    directory = tmp_path_factory.mktemp("jsonl")
    files = letters_task(directory, 24, 6)
    return {
        **files,
        "INITIAL_CHECKPOINT_PATH": checkpoint,
        "VOCABULARY": "bytes",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": 4,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared):
    """A run of `coda train` with CoDA."""
    directory = tmp_path_factory.mktemp("run")
    given = {"MODEL_DIR": directory, "TRAIN_STEPS": 24, "ParallelAdapter.bottleneck": 4}
    files = ["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]
    coda("train", files, shared | given)
    return directory


def test_a_frozen_model_that_would_stay_random_is_refused(shared, tmp_path, capsys):
    sizes = {name: getattr(CONFIG, name) for name in ("emb_dim", "mlp_dim", "num_encoder_layers")}
    given = {"MODEL_DIR": tmp_path, "TRAIN_STEPS": 1, "INITIAL_CHECKPOINT_PATH": None}
    given |= {"PRESET": "t5_1_1_small", "PRESET_CHANGES": {**sizes, "vocab_size": 384}}
    files = ["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]
    assert cli.main(["train", *flags(files, shared | given)]) == 1
    said = capsys.readouterr().err
    assert re.search(
        r"coda train: INITIAL_CHECKPOINT_PATH=None: [\d,]+ of [\d,]+ parameters are frozen and "
        r"would stay random; name a checkpoint, or train all of them \(methods/full.gin\)",
        said,
    )
    assert not (tmp_path / "checkpoints").exists()


def test_evaluate_does_not_write_over_what_it_reads(trained, shared, tmp_path, capsys):
    given = shared | {"INITIAL_ADAPTER_PATH": trained / "export" / "adapter"}
    del given["TASK_FEATURE_LENGTHS"]
    files, valid = ["runs/evaluate.gin", "tasks/jsonl.gin"], shared["VALIDATION_FILE"]
    before = valid.read_bytes()
    assert cli.main(["evaluate", *flags(files, given | {"PREDICTIONS": valid})]) == 1
    assert "is read: give what is written another name" in capsys.readouterr().err
    both = dict.fromkeys(("OUTPUT", "PREDICTIONS"), tmp_path / "x")
    assert cli.main(["evaluate", *flags(files, given | both)]) == 1
    assert "need names of their own" in capsys.readouterr().err
    assert valid.read_bytes() == before


def test_train_exports_an_adapter_for_the_checkpoint(trained, checkpoint):
    cfg, params = checkpoints.load_adapter(
        trained / "export" / "adapter", *checkpoints.load_hf(checkpoint)
    )
    assert cfg.methods == (Coda(reduction=3), ParallelAdapter(bottleneck=4))
    assert np.asarray(params["encoder"]["layers_0"]["adapter"]["wo"]["kernel"]).any()
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics.keys() >= {"loss", "exact_match"}
    curves = read_metrics(trained)
    assert {name: curves[f"eval/{name}"][-1] for name in metrics} == {
        name: (24, value) for name, value in metrics.items()
    }
    assert (trained / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_epochs_are_so_many_steps(shared, trained, tmp_path, capsys):
    """24 examples in batches of 4: four epochs are the steps of the run above."""
    files = ["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]
    given = shared | {"ParallelAdapter.bottleneck": 4, "EPOCHS": 4}
    same = shutil.copytree(trained, tmp_path / "same")
    coda("train", files, given | {"MODEL_DIR": same})
    said = capsys.readouterr()
    assert "train.jsonl: EPOCHS=4 of 24 examples are 24 steps" in said.err
    assert "the run is finished: it ended at step 24 of 24" in said.out


@pytest.mark.all
def test_an_early_end_exports_the_best(shared, tmp_path):
    files = ["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]
    given = shared | {"ParallelAdapter.bottleneck": 4, "MODEL_DIR": tmp_path / "early"}
    given |= {"BEST_METRIC": "token_accuracy", "PATIENCE": 1, "TrainOptions.save_every": 1}
    coda("train", files, given)
    curve = read_metrics(tmp_path / "early")["eval/token_accuracy"]
    assert len(curve) < 1000 and curve[-1][1] <= curve[-2][1]
    exported = json.loads((tmp_path / "early" / "metrics.json").read_text())
    assert exported["token_accuracy"] == curve[-2][1] == max(value for _, value in curve)


def test_a_model_card_lies_beside_the_adapter(trained, checkpoint):
    card = (trained / "export" / "adapter" / "README.md").read_text()
    assert f'base_model: "{checkpoint}"\n' in card
    assert "# coda + parallel_adapter of" in card and "| exact_match |" in card
    assert "      --gin_file=methods/coda.gin \\\n" in card
    assert f"      --gin.MODEL_DIR={trained} \\\n" in card


def test_evaluate_agrees_with_the_evaluation_during_training(trained, shared, tmp_path):
    given = {
        "INITIAL_ADAPTER_PATH": trained / "export" / "adapter",
        "OUTPUT": tmp_path / "metrics.json",
        "PREDICTIONS": tmp_path / "each.jsonl",
        "Decoding.max_decode_length": 4,
    }
    coda("evaluate", ["runs/evaluate.gin", "tasks/jsonl.gin"], shared | given)
    each = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    lines = shared["VALIDATION_FILE"].read_text().splitlines()
    assert [{key: line[key] for key in ("inputs", "targets")} for line in each] == [
        *map(json.loads, lines)
    ]
    (metrics,) = json.loads((tmp_path / "metrics.json").read_text()).values()
    during = json.loads((trained / "metrics.json").read_text())
    assert metrics["accuracy"] == pytest.approx(100 * during["exact_match"], abs=1e-4)
    right = sum(line["prediction"] == line["targets"] for line in each)
    assert metrics["accuracy"] == pytest.approx(100 * right / len(each))
    assert all(line["score"] < 0 for line in each)
    (tmp_path / "inputs.txt").write_text("\n".join(line["inputs"] for line in each))
    names = ("INITIAL_CHECKPOINT_PATH", "VOCABULARY")
    own = {name: shared[name] for name in names} | {"OUTPUT": tmp_path / "answers.jsonl"}
    own |= {"INPUT": tmp_path / "inputs.txt", "Decoding.max_decode_length": 4}
    own["INITIAL_ADAPTER_PATH"] = given["INITIAL_ADAPTER_PATH"]
    coda("predict", ["runs/predict.gin"], own)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in each] == [line["prediction"] for line in answers]
    assert any(line["prediction"] for line in each)
    with pytest.raises(
        ValueError, match=r"CONFUSION='c\.png' is of labels, and the model has none"
    ):
        coda("evaluate", ["runs/evaluate.gin", "tasks/jsonl.gin"], shared | {"CONFUSION": "c.png"})


def test_predict_answers_in_order(trained, checkpoint, tmp_path):
    texts = ["fade", "a much longer input", "b"]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    given = {
        "INITIAL_CHECKPOINT_PATH": checkpoint,
        "INITIAL_ADAPTER_PATH": trained / "export" / "adapter",
        "VOCABULARY": "bytes",
        "INPUT": tmp_path / "in.txt",
        "OUTPUT": tmp_path / "out.jsonl",
        "REDUCTION": 2,
        "Decoding.max_decode_length": 4,
    }
    coda("predict", ["runs/predict.gin"], given)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["inputs"] for line in lines] == texts
    assert all(isinstance(line["prediction"], str) for line in lines)


def test_a_mesh_changes_no_answer(trained, shared, checkpoint, tmp_path):
    """Of the two devices each holds half of the heads, channels and ids."""
    (tmp_path / "in.txt").write_text("fade\na much longer input\nb\n")
    adapter = {"INITIAL_ADAPTER_PATH": trained / "export" / "adapter"}
    adapter |= {"Decoding.max_decode_length": 4}
    given = {"INITIAL_CHECKPOINT_PATH": checkpoint, "VOCABULARY": "bytes", "SCORES": True}
    given |= adapter | {"INPUT": tmp_path / "in.txt"}
    metrics, lines = [], []
    for mesh in (None, {"data": 1, "model": 2}):
        out = tmp_path / str(mesh)
        of_task = shared | adapter | {"OUTPUT": f"{out}.json", "MESH": mesh}
        coda("evaluate", ["runs/evaluate.gin", "tasks/jsonl.gin"], of_task)
        metrics.append(json.loads((tmp_path / f"{mesh}.json").read_text()))
        coda("predict", ["runs/predict.gin"], given | {"OUTPUT": f"{out}.jsonl", "MESH": mesh})
        lines.append([json.loads(x) for x in (tmp_path / f"{mesh}.jsonl").read_text().splitlines()])
    assert metrics[0] == metrics[1]
    for whole, divided in zip(*lines, strict=True):
        assert whole["prediction"] == divided["prediction"]
        score, other = (line["score"] for line in (whole, divided))
        assert score == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ({"data": 3}, "MESH must be of all 2 devices, got 3 x 1 = 3"),
        ({"rows": 2}, "MESH must be a dictionary such as {'data': 4, 'model': 2}, got {'rows': 2}"),
    ],
)
@pytest.mark.parametrize(
    ("command", "files"),
    [
        ("train", ["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]),
        ("evaluate", ["runs/evaluate.gin", "tasks/jsonl.gin"]),
        ("predict", ["runs/predict.gin"]),
    ],
)
def test_a_mesh_that_is_none_is_told_before_a_model_is_read(
    command, files, mesh, said, shared, tmp_path, capsys
):
    given = {"INITIAL_CHECKPOINT_PATH": tmp_path / "missing", "MESH": mesh}
    if command == "predict":
        given |= {"INPUT": tmp_path / "in.txt"}
    else:
        given |= {name: shared[name] for name in ("TRAIN_FILE", "VALIDATION_FILE", "VOCABULARY")}
    given |= {"MODEL_DIR": tmp_path / "run"} if command == "train" else {}
    assert cli.main([command, *flags(files, given)]) == 1
    assert capsys.readouterr().err == f"coda {command}: {said}\n"


def test_parts_of_a_batch_that_devices_cannot_share_are_told(shared, tmp_path, capsys):
    files = ["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]
    given = {"MODEL_DIR": tmp_path / "run", "ACCUMULATION": 4}
    assert cli.main(["train", *flags(files, shared | given)]) == 1
    assert capsys.readouterr().err == (
        "coda train: BATCH_SIZE must be a multiple of ACCUMULATION=4 x 2 devices = 8, got 4\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_cache_gives_the_batches_of_the_task(checkpoint, shared, tmp_path):
    read = ("TRAIN_FILE", "VALIDATION_FILE", "VOCABULARY", "TASK_FEATURE_LENGTHS")
    given = {name: shared[name] for name in read} | {"OUTPUT": tmp_path / "train.npz"}
    coda("cache", ["runs/cache.gin", "tasks/jsonl.gin"], given)
    examples, metadata = read_cache(tmp_path / "train.npz")
    assert len(examples) == 24
    assert metadata["vocabulary"] == "bytes"
    data = Data(LENGTHS, cache=str(tmp_path / "train.npz"), batch_size=4)
    assert next(iter(data.batches(repeat=True)))["encoder_input_tokens"].shape == (4, 8)


def test_a_checkpoint_of_another_vocabulary_is_refused(checkpoint):
    import coda_jax.tasks.offline  # noqa: F401

    model = load_model(str(checkpoint))
    with pytest.raises(ValueError, match="4096 ids, the model only 384"):
        Data(LENGTHS, task="stdlib_module").check_vocabulary(
            model.config.vocab_size, model.directory
        )


@pytest.mark.all
def test_training_goes_on_from_an_adapter_file_at_another_reduction(trained, shared, tmp_path):
    given = {
        "MODEL_DIR": tmp_path,
        "INITIAL_ADAPTER_PATH": trained / "export" / "adapter",
        "TRAIN_STEPS": 2,
        "REDUCTION": 4,
        "ParallelAdapter.bottleneck": ADAPTER.bottleneck,
        "EVAL_TASK_NAME": None,
    }
    files = ["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]
    coda("train", files, shared | given)
    base = shared["INITIAL_CHECKPOINT_PATH"]
    found = load_model(str(base), adapter_checkpoint=str(tmp_path / "export" / "adapter"))
    assert method_of(found.config, Coda).reduction == 4
