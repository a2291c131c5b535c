"""`coda predict` with a detector: answers that are out of distribution are null, and said to be."""

import csv
import json
import pathlib

from helpers import TINY, config, random_params
import pytest

from coda_jax.commands.loading import LoadedModel
from coda_jax.commands.marking import Marking
from coda_jax.commands.ood import Scoring, ood
from coda_jax.commands.predict import predict
from coda_jax.data import jsonl
from coda_jax.data.labels import labelled_task
from coda_jax.inference import Decoding

CONFIG = config(coda={"reduction": 2.0}, vocab_size=384, num_encoder_layers=1, num_decoder_layers=1)
HEAD = TINY.encoder_only().replace(vocab_size=384, head="classification", labels=("card", "cash"))
NAMES = ("card", "cash")
DECODING = Decoding(batch_size=4)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def detected(config, folder):
    """(model, its detector, report, {input: its scores}, file of others) of `coda ood`."""
    texts = {"inputs": [f"{name} {i}" for i in range(4) for name in NAMES]}
    target = "label" if config.labels else "targets"
    rows = [{"inputs": text, target: text[:4]} for text in texts["inputs"]]
    train = write(folder / "train.jsonl", rows)
    others = write(
        folder / "others.jsonl", [{"inputs": f"{i}" * (3 + i), "id": i} for i in range(5)]
    )
    model = LoadedModel(config, random_params(config), None)
    if config.labels:
        names = {"vocabulary": "bytes", "labels": NAMES}
        task = labelled_task(train_file=train, validation_file=train, **names)
    else:
        task = jsonl.jsonl_task(train_file=train, validation_file=train, vocabulary="bytes")
    files = {"detector": folder / "x.safetensors", "predictions": folder / "scores.jsonl"}
    report = ood(
        *(model, task, {"inputs": 16}, DECODING, others),
        scoring=Scoring(bootstrap=2, neighbours=2, false_alarms=0.3),
        **{name: str(file) for name, file in files.items()},
    )
    lines = [json.loads(line) for line in files["predictions"].read_text().splitlines()]
    scores = {line["inputs"]: line["scores"] for line in lines}
    return model, str(files["detector"]), report, scores, others


@pytest.fixture(name="decoder", scope="module")
def fixture_decoder(tmp_path_factory):
    return detected(CONFIG, tmp_path_factory.mktemp("decoder"))


def answered(model, inputs, output, **arguments):
    predict(model, inputs, str(output), DECODING, "bytes", **arguments)
    return [json.loads(line) for line in pathlib.Path(output).read_text().splitlines()]


def between(scores, name):
    """A threshold that some of the others pass."""
    found = [of_input[name] for text, of_input in scores.items() if text.isdigit()]
    return (min(found) + max(found)) / 2


def test_rows_are_marked_by_the_scores_of_coda_ood(decoder, tmp_path):
    model, detector, report, scores, others = decoder
    name = "decoder_mahalanobis"
    threshold = between(scores, name)
    marking = Marking(detector, name, threshold)
    rows = answered(model, others, tmp_path / "x.jsonl", marking=marking, scores=True)
    for i, row in enumerate(rows):
        assert row["ood_score"] == pytest.approx(scores[row["inputs"]][name], rel=1e-4)
        assert row["out_of_distribution"] == (row["ood_score"] < threshold)
        assert (row["id"], [*row][-2:]) == (i, ["out_of_distribution", "ood_score"])
        answers = [row["prediction"], row["score"]]
        assert (answers == [None, None]) == row["out_of_distribution"]
    assert {row["out_of_distribution"] for row in rows} == {True, False}
    assert report["thresholds"].keys() == scores["000"].keys()


@pytest.mark.all
def test_without_a_threshold_it_is_that_of_the_file_and_other_answers_stay(decoder, tmp_path):
    model, detector, report, scores, others = decoder
    plain = answered(model, others, tmp_path / "plain.jsonl")
    for name, threshold in report["thresholds"].items():
        marking = Marking(detector, name)
        # One at a time, as lines of standard input may come.
        rows = answered(model, others, tmp_path / "x.jsonl", marking=marking, chunk_size=1)
        for row, before in zip(rows, plain, strict=True):
            score = scores[row["inputs"]][name]
            assert row["ood_score"] == pytest.approx(score, rel=1e-3, abs=1e-5)
            if abs(score - threshold) > 1e-3 * abs(score):
                assert row["out_of_distribution"] == (score < threshold)
            if not row["out_of_distribution"]:
                assert before.items() <= row.items()
    table = tmp_path / "x.csv"
    predict(model, others, str(table), DECODING, "bytes", marking=Marking(detector, "energy", 0))
    with table.open() as file:
        (first, *_) = csv.DictReader(file)
    assert (first["prediction"], first["out_of_distribution"]) == ("null", "true")


@pytest.mark.all
def test_labels_of_a_head_are_marked(tmp_path):
    model, detector, report, scores, others = detected(HEAD, tmp_path)
    threshold = between(scores, "encoder_cosine")
    marking = Marking(detector, "encoder_cosine", threshold)
    rows = answered(model, others, tmp_path / "x.jsonl", marking=marking)
    for row in rows:
        marked = row["out_of_distribution"]
        assert row["ood_score"] == pytest.approx(scores[row["inputs"]]["encoder_cosine"], rel=1e-4)
        assert (row["prediction"] is None, row["scores"] is None) == (marked, marked)
    assert {row["out_of_distribution"] for row in rows} == {True, False}
    assert not any(name.startswith(("router", "decoder")) for name in report["thresholds"])


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        ({}, {}, r"OOD_SCORE must be one of \('max_softmax', 'energy', .*, got None"),
        ({"score": "logits"}, {}, "OOD_SCORE must be one of .*, got 'logits'"),
        ({"score": "energy"}, {"stream": True}, "marks the answers of one model: no STREAM"),
        ({"score": "energy"}, {"embed": "mean"}, "marks the answers of one model: no EMBED"),
    ],
)
def test_what_cannot_be_marked_is_named(decoder, tmp_path, given, arguments, message):
    model, detector, *_, others = decoder
    with pytest.raises(ValueError, match=message):
        marking = Marking(detector, **given)
        predict(model, others, str(tmp_path / "x"), DECODING, "bytes", marking=marking, **arguments)


def test_other_limits_and_thresholds_alone_are_refused(decoder, tmp_path):
    model, detector, *_, others = decoder
    with pytest.raises(ValueError, match="is of inputs of at most 16, not Decoding"):
        decoding = Decoding(max_input_length=8)
        predict(model, others, "-", decoding, "bytes", marking=Marking(detector, "energy"))
    with pytest.raises(ValueError, match="is read: give what is written another name"):
        predict(model, others, detector, DECODING, "bytes", marking=Marking(detector, "energy"))
    with pytest.raises(ValueError, match="OOD_SCORE and THRESHOLD: no effect without DETECTOR"):
        Marking(None, "energy", 0.5)
