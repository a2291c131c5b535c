"""`coda ood`: scores of inputs in and out of distribution, and what is said of bad ones."""

import json
import pathlib
import re

from command_line import coda
from helpers import TINY, config, random_params
import jax
import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score

from coda_jax import checkpoints
from coda_jax.commands.loading import LoadedModel
from coda_jax.commands.ood import Scoring, ood
from coda_jax.data import jsonl
from coda_jax.inference import Decoding
from coda_jax.objectives import model_for
from coda_jax.objectives.prefix_tree import prefix_tree

CONFIG = config(coda={"reduction": 2.0}, vocab_size=384, num_encoder_layers=1, num_decoder_layers=1)
NAMES = ("card", "cash", "loan", "rate")
LENGTHS = {"inputs": 8, "targets": 8}
FEW = Scoring(bootstrap=5, neighbours=2)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(name="files", scope="module")
def fixture_files(tmp_path_factory):
    """{split: file} of inputs that name their label, and a file of others."""
    folder = tmp_path_factory.mktemp("files")
    rows = [
        {"inputs": f"{name} {'x' * (i % 3)}", "targets": name} for i in range(3) for name in NAMES
    ]
    found = {"train_file": write(folder / "train.jsonl", rows)}
    new = {"inputs": "new one", "targets": "never seen"}
    found["validation_file"] = write(folder / "validation.jsonl", [*rows[:6], new])
    found["others"] = write(folder / "others.jsonl", [{"inputs": f"{i}" * 3} for i in range(5)])
    return found


@pytest.fixture(name="model", scope="module")
def fixture_model():
    return LoadedModel(CONFIG, random_params(CONFIG), None)


def task_of(files):
    of_task = {name: files[name] for name in ("train_file", "validation_file")}
    return jsonl.jsonl_task(**of_task, vocabulary="bytes")


def test_scores_of_each_input_make_the_metrics(model, files, tmp_path, capsys):
    written = {"output": str(tmp_path / "x.json"), "predictions": str(tmp_path / "x.jsonl")}
    report = ood(
        *(model, task_of(files), LENGTHS, Decoding(batch_size=4)),
        outside=files["others"],
        held_out=("loan",),
        scoring=FEW,
        **written,
    )
    said = capsys.readouterr()
    assert report == json.loads((tmp_path / "x.json").read_text())
    of_energy = report["sets"]["held_out"]["energy"]["auroc"]["value"]
    assert re.search(rf"\n  energy +{of_energy:.3f} \(", said.out)
    assert (
        "1 of 7 examples are left out: no training example has their label, such as 'never se"
        in (said.err)
    )
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    sets = {name: [x for x in lines if x["set"] == name] for name in {x["set"] for x in lines}}
    assert {name: len(rows) for name, rows in sets.items()} == {
        "in": 5,
        "held_out": 1,
        files["others"]: 5,
    }
    assert report["labels"] == ["card", "cash", "rate"]
    assert (report["held_out"], report["examples"]) == (["loan"], 5)
    right = [row["prediction"] == row["label"] for row in sets["in"]]
    assert report["accuracy"]["value"] == pytest.approx(np.mean(right))
    for name, of_set in report["sets"].items():
        for score, metrics in of_set.items():
            if score == "examples":
                continue
            both = [row["scores"][score] for row in (*sets["in"], *sets[name])]
            kinds = [1] * len(sets["in"]) + [0] * len(sets[name])
            assert metrics["auroc"]["value"] == pytest.approx(roc_auc_score(kinds, both))
            low, high = metrics["auroc"]["interval"]
            assert 0 <= low <= high <= 1
    # One of them, by hand: energy is the log-sum-exp of the known labels' log-probabilities.
    vocabulary = jsonl.TASKS[report["task"]].vocabulary
    known = [[*vocabulary.encode(name), 1] for name in NAMES if name != "loan"]
    inputs = np.array([[*vocabulary.encode(sets[files["others"]][2]["inputs"]), 1]])
    tree, asked = prefix_tree(known, CONFIG.decoder_start_id), model_for(CONFIG)
    scored = jax.jit(lambda params: asked.score_targets(params, inputs, tree))(model.params)
    energy = sets[files["others"]][2]["scores"]["energy"]
    assert energy == pytest.approx(logsumexp(scored.log_probs[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"nothing is out of distribution: give OOD, such as \('others.jsonl',\), or HELD_OUT"),
        ({"held_out": ("cards",)}, r"HELD_OUT: the task has no label 'cards'; the nearest are"),
        ({"outside": ("no.jsonl",)}, r"no.jsonl"),
        ({"outside": ":test"}, r"has no split 'test', only \['train', 'validation'\]"),
        ({"outside": ("a.txt", "a.txt")}, "names a set twice"),
        ({"held_out": ("rate",), "predictions": "x", "output": "x"}, "need names of their own"),
    ],
)
def test_what_cannot_be_compared_is_named(model, files, given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ood(model, task_of(files), LENGTHS, Decoding(), scoring=FEW, **given)


def test_an_empty_set_is_refused(model, files, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl: the file is empty"):
        empty = str(tmp_path / "empty.jsonl")
        ood(model, task_of(files), LENGTHS, Decoding(), outside=empty, scoring=FEW)


@pytest.mark.all
def test_identical_sets_are_not_told_apart_and_long_inputs_are_counted(model, files, capsys):
    other = dict(files, validation_file=files["train_file"])
    task = task_of(other)
    same = ood(model, task, {"inputs": 5}, Decoding(), outside=":train", scoring=FEW)
    for score, metrics in same["sets"][":train"].items():
        assert score == "examples" or metrics["auroc"]["value"] == pytest.approx(0.5)
    assert "inputs were longer than 5 tokens and were cut" in capsys.readouterr().err


@pytest.mark.all
def test_a_numeric_head_has_no_labels(files, tmp_path):
    from coda_jax.data.labels import labelled_task

    cfg = TINY.encoder_only().replace(head="regression", vocab_size=384)
    rows = [{"inputs": f"{i}", "label": i} for i in range(3)]
    file = write(tmp_path / "numbers.jsonl", rows)
    task = labelled_task(train_file=file, validation_file=file, vocabulary="bytes", labels=())
    with pytest.raises(ValueError, match="the model gives numbers, and what is known are labels"):
        ood(LoadedModel(cfg, random_params(cfg), None), task, None, Decoding(), files["others"])


@pytest.mark.all
def test_the_command_line_draws_the_curves(files, tmp_path):
    """Of a decoder with an adapter, and of a head that was trained with it."""
    base = TINY.replace(vocab_size=384)
    checkpoints.save_hf(tmp_path / "base", base, random_params(base))
    given = {"INITIAL_CHECKPOINT_PATH": tmp_path / "base", "VOCABULARY": "bytes"}
    lines = pathlib.Path(files["train_file"]).read_text().splitlines()
    rows = list(map(json.loads, lines))
    labelled = write(
        tmp_path / "labels.jsonl", [{"inputs": x["inputs"], "label": x["targets"]} for x in rows]
    )
    for kind, file in (("jsonl", files["train_file"]), ("labels", labelled)):
        task = given | {"TRAIN_FILE": file, "VALIDATION_FILE": file}
        run = {"MODEL_DIR": tmp_path / kind, "TRAIN_STEPS": 2, "BATCH_SIZE": 4}
        gin_files = ["runs/finetune.gin", "methods/coda.gin", f"tasks/{kind}.gin"]
        coda("train", gin_files, task | run | {"TASK_FEATURE_LENGTHS": LENGTHS})
        asked = {
            "INITIAL_ADAPTER_PATH": tmp_path / kind / "export" / "adapter",
            "OOD": files["others"],
            "CURVES": tmp_path / f"{kind}.png",
            "OUTPUT": tmp_path / f"{kind}.json",
            "BOOTSTRAP": 3,
            "NEIGHBOURS": 2,
            "BATCH_SIZE": 4,
        }
        coda("ood", ["runs/ood.gin", f"tasks/{kind}.gin"], task | asked)
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
        report = json.loads((tmp_path / f"{kind}.json").read_text())
        features = {"encoder", "router"} | ({"decoder"} if kind == "jsonl" else set())
        assert {name.split("_")[0] for name in report["thresholds"]} - {"max", "energy"} == features
        assert report["labels"] == [*NAMES]
