"""Labels from the command line: an encoder alone with a head, and its outputs as they are."""

import json

from command_line import coda
from helpers import TINY, random_params
import pytest

from coda_jax import checkpoints
from coda_jax.checkpoints.swap_in import encoder_of

ROWS = [
    {
        "inputs": "good" * (1 + i % 3) if i % 2 else "bad" * (1 + i % 3),
        "label": ["no", "yes"][i % 2],
    }
    for i in range(24)
]
RUN = ["runs/finetune.gin", "methods/coda.gin", "tasks/labels.gin"]


@pytest.fixture(name="base", scope="module")
def fixture_base(tmp_path_factory):
    """An encoder-decoder, of which the encoder alone is taken."""
    config = TINY.replace(vocab_size=384)
    folder = tmp_path_factory.mktemp("base")
    checkpoints.save_hf(folder, config, random_params(config))
    return folder


@pytest.fixture(name="files", scope="module")
def fixture_files(tmp_path_factory):
    """JSONL files of classes, and of numbers."""
    folder = tmp_path_factory.mktemp("files")
    numbers = [{**row, "label": len(row["inputs"]) / 10} for row in ROWS]
    for name, rows in (("classes", ROWS), ("numbers", numbers)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(name="trained", scope="module", params=["classes", "numbers"])
def fixture_trained(request, base, files, tmp_path_factory):
    """A run of each kind of head: (its folder, what names the task)."""
    folder = tmp_path_factory.mktemp("run")
    head = "classification" if request.param == "classes" else "regression"
    given = {
        "INITIAL_CHECKPOINT_PATH": base,
        "TRAIN_FILE": files / request.param,
        "VALIDATION_FILE": files / request.param,
        "VOCABULARY": "bytes",
        "HEAD": head,
        "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 1},
    }
    run = {"MODEL_DIR": folder, "TRAIN_STEPS": 40, "BATCH_SIZE": 8, "ParallelAdapter.bottleneck": 4}
    coda("train", RUN, {**given, **run, "REDUCTION": 2, "PEAK_LEARNING_RATE": 0.03})
    return folder, given


def test_the_adapter_holds_the_head_and_its_base_is_whole(trained, base):
    folder, given = trained
    config, params = checkpoints.load_adapter(
        folder / "export" / "adapter",
        *encoder_of(*checkpoints.load_hf(base)),
    )
    assert config.head == given["HEAD"]
    assert config.labels == (("no", "yes") if config.head == "classification" else ())
    assert params["head"]["kernel"].shape == (16, config.num_outputs)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.get("accuracy", 1.0) > 0.9 and metrics["loss"] < 0.3


def test_a_head_is_not_trained_with_all_of_its_base(base, files, tmp_path):
    """A folder of Hugging Face has no place for it."""
    given = {"INITIAL_CHECKPOINT_PATH": base, "TRAIN_FILE": files / "classes"}
    with pytest.raises(ValueError, match=r"head='classification' .* an adapter file"):
        coda(
            "train",
            ["runs/finetune.gin", "methods/full.gin", "tasks/labels.gin"],
            {**given, "VOCABULARY": "bytes", "MODEL_DIR": tmp_path / "run"},
        )
    assert not (tmp_path / "run").exists()


def test_evaluate_and_predict_agree_with_the_run(trained, tmp_path):
    folder, given = trained
    task = {key: value for key, value in given.items() if key != "TRAIN_FILE"}
    adapter = {"INITIAL_ADAPTER_PATH": folder / "export" / "adapter"}
    output = {"OUTPUT": tmp_path / "metrics.json"}
    coda("evaluate", ["runs/evaluate.gin", "tasks/labels.gin"], {**task, **adapter, **output})
    (found,) = json.loads((tmp_path / "metrics.json").read_text()).values()
    expected = json.loads((folder / "metrics.json").read_text())
    assert found == pytest.approx(expected, abs=1e-4)

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"inputs": row["inputs"]}) + "\n" for row in ROWS))
    asked = {"INPUT": texts, "OUTPUT": tmp_path / "out.jsonl", "VOCABULARY": "bytes"}
    given = {"INITIAL_CHECKPOINT_PATH": given["INITIAL_CHECKPOINT_PATH"], **adapter, **asked}
    coda("predict", ["runs/predict.gin"], given)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = [line["prediction"] for line in lines]
    if "accuracy" in expected:
        right = [a == row["label"] for a, row in zip(answers, ROWS, strict=True)]
        assert sum(right) / len(right) == pytest.approx(expected["accuracy"])
        assert all(line["scores"].keys() == {"no", "yes"} for line in lines)
        assert all(sum(line["scores"].values()) == pytest.approx(1.0) for line in lines)
    else:
        errors = [abs(a - len(row["inputs"]) / 10) for a, row in zip(answers, ROWS, strict=True)]
        mean = sum(errors) / len(errors)
        assert mean == pytest.approx(expected["mean_absolute_error"], abs=1e-4)
