"""Labels from the command line: an encoder alone with a head, and its outputs as they are."""

import csv
import json

from command_line import coda
from helpers import TINY, assert_same_tree, random_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from coda_jax import checkpoints
from coda_jax.commands.loading import load_model
from coda_jax.objectives import model_for

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


@pytest.fixture(
    name="trained",
    scope="module",
    params=["classes", pytest.param("numbers", marks=pytest.mark.all)],
)
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
        *checkpoints.load_hf(base),  # an encoder-decoder: its encoder is taken
    )
    assert config.head == given["HEAD"]
    assert config.labels == (("no", "yes") if config.head == "classification" else ())
    assert params["head"]["kernel"].shape == (16, config.num_outputs)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["loss"] < 0.3
    if config.head == "classification":
        assert metrics["accuracy"] > 0.9
    else:
        assert metrics["mean_absolute_error"] < 0.5


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


def check_scores(found, pairs):
    """The metrics are those of (label, prediction), each counted by hand."""
    for label, of_class in found["classes"].items():
        right = pairs.count((label, label))
        there = sum(true == label for true, _ in pairs)
        taken = sum(answer == label for _, answer in pairs)
        assert of_class["examples"] == there
        assert of_class["recall"] == pytest.approx(right / there)
        assert of_class["precision"] == pytest.approx(right / taken if taken else 0)
        assert of_class["f1"] == pytest.approx(2 * right / (there + taken))
    for name in ("precision", "recall", "f1"):
        values = [of_class[name] for of_class in found["classes"].values()]
        assert found[name] == pytest.approx(sum(values) / len(values))


def test_evaluate_and_predict_agree_with_the_run(trained, tmp_path):
    folder, given = trained
    rows = [json.loads(line) for line in given["VALIDATION_FILE"].read_text().splitlines()]
    with (tmp_path / "same.csv").open("w", newline="") as file:
        cells = [(row["label"], number, row["inputs"]) for number, row in enumerate(rows)]
        csv.writer(file).writerows([("label", "n", "text"), *cells])
    task = {key: value for key, value in given.items() if key not in ("TRAIN_FILE", "HEAD")}
    task |= {"VALIDATION_FILE": tmp_path / "same.csv", "INPUT_FIELD": "'{text}'"}
    adapter = {"INITIAL_ADAPTER_PATH": folder / "export" / "adapter"}
    output = {"OUTPUT": tmp_path / "metrics.json", "PREDICTIONS": tmp_path / "each.jsonl"}
    if given["HEAD"] == "classification":
        output["CONFUSION"] = tmp_path / "confusion.png"
    coda("evaluate", ["runs/evaluate.gin", "tasks/labels.gin"], {**task, **adapter, **output})
    (found,) = json.loads((tmp_path / "metrics.json").read_text()).values()
    expected = json.loads((folder / "metrics.json").read_text())
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    each = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    if given["HEAD"] == "classification":
        assert [{key: line[key] for key in ROWS[0]} for line in each] == ROWS
        check_scores(found, [(line["label"], line["prediction"]) for line in each])
        assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")

    asked = {"INPUT": tmp_path / "same.csv", "OUTPUT": tmp_path / "out.jsonl"}
    asked |= {"INPUT_FIELD": "text", "VOCABULARY": "bytes"}
    asked |= {"SCORES": given["HEAD"] == "classification"}
    given = {"INITIAL_CHECKPOINT_PATH": given["INITIAL_CHECKPOINT_PATH"], **adapter, **asked}
    coda("predict", ["runs/predict.gin"], given)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == [*map(str, range(len(ROWS)))]
    answers = [line["prediction"] for line in lines]
    together = [line["prediction"] for line in each]
    assert together == (answers if "accuracy" in expected else pytest.approx(answers, abs=1e-4))
    if "accuracy" in expected:
        right = [a == row["label"] for a, row in zip(answers, ROWS, strict=True)]
        assert sum(right) / len(right) == pytest.approx(expected["accuracy"])
        assert all(line["scores"].keys() == {"no", "yes"} for line in lines)
        assert all(sum(line["scores"].values()) == pytest.approx(1.0) for line in lines)
        for line in lines:
            assert np.exp(line["score"]) == pytest.approx(max(line["scores"].values()), abs=1e-6)
    else:
        with pytest.raises(ValueError, match="the encoder answers: no SCORES"):
            coda("predict", ["runs/predict.gin"], {**given, "SCORES": True})
        errors = [abs(a - len(row["inputs"]) / 10) for a, row in zip(answers, ROWS, strict=True)]
        mean = sum(errors) / len(errors)
        assert mean == pytest.approx(expected["mean_absolute_error"], abs=1e-4)


def test_an_encoder_alone_is_written_as_a_checkpoint(base, tmp_path):
    given = {"INPUT": base, "OUTPUT": tmp_path / "alone", "LAYOUT": "hf", "ENCODER_ONLY": True}
    coda("convert", ["runs/convert.gin"], given)
    raw = json.loads((tmp_path / "alone" / "config.json").read_text())
    assert raw["architectures"] == ["T5EncoderModel"]
    config, params = checkpoints.load_hf(tmp_path / "alone")
    expected, same = checkpoints.encoder_of(*checkpoints.load_hf(base))
    assert config == expected
    assert_same_tree(params, same)


@pytest.mark.all
def test_outputs_of_the_encoder_are_written_as_safetensors(base, tmp_path):
    texts = ["a", "longer than that", "b c"]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    given = {"INITIAL_CHECKPOINT_PATH": base, "INPUT": tmp_path / "in.txt", "VOCABULARY": "bytes"}
    for embed in ("mean", "tokens"):
        asked = {"EMBED": embed, "OUTPUT": tmp_path / embed}
        coda("predict", ["runs/predict.gin"], {**given, **asked})
    tokens, means = load_file(tmp_path / "tokens"), load_file(tmp_path / "mean")["embeddings"]
    config, params = checkpoints.load_hf(base)
    for number, text in enumerate(texts):
        ids = np.array([[*(byte + 3 for byte in text.encode()), 1]])
        expected = np.asarray(model_for(config).encode(params, ids)[0])
        np.testing.assert_allclose(tokens[str(number)], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(means[number], expected.mean(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="give OUTPUT"):
        coda("predict", ["runs/predict.gin"], {**given, "EMBED": "mean"})
    with pytest.raises(ValueError, match="embed='max' must be one of"):
        asked = {"EMBED": "max", "OUTPUT": tmp_path / "max"}
        coda("predict", ["runs/predict.gin"], {**given, **asked})


@pytest.mark.all
@pytest.mark.parametrize("embed", [None, "mean"])
def test_an_exported_encoder_gives_the_same(trained, embed, tmp_path):
    folder, given = trained
    adapter = folder / "export" / "adapter"
    checkpoint = {"INITIAL_CHECKPOINT_PATH": given["INITIAL_CHECKPOINT_PATH"]}
    asked = {"OUTPUT": tmp_path / "served", "BATCH_SIZES": (2,), "EMBED": embed}
    asked |= {"Decoding.max_input_length": 8, "INITIAL_ADAPTER_PATH": adapter}
    coda("export", ["runs/export.gin"], {**checkpoint, **asked})
    manifest = json.loads((tmp_path / "served" / "manifest.json").read_text())
    assert (manifest["arguments"], manifest["results"]) == (["weights", "inputs"], ["outputs"])
    arrays = np.load(tmp_path / "served" / "weights.npz")
    weights = [arrays[k].view(jnp.dtype(t))[..., 0] for k, t in manifest["weights"].items()]
    file = tmp_path / "served" / "predict_2x8.jax_export"
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    inputs = np.array([[5, 6, 7, 1, 0, 0, 0, 0], [9, 1, 0, 0, 0, 0, 0, 0]], np.int32)
    found = program.call(weights, inputs)
    model = load_model(str(given["INITIAL_CHECKPOINT_PATH"]), adapter_checkpoint=str(adapter))
    if embed is None:
        expected = model_for(model.config).predict(model.params, inputs)
    else:
        encoded = np.asarray(model_for(model.config).encode(model.params, inputs))
        expected = np.stack([encoded[0, :4].mean(0), encoded[1, :2].mean(0)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
