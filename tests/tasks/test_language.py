"""Tests of coda_jax.tasks.language: T5's texts, the sources, and every bad input is named.

TFDS is served by TFDS's own mock: real names, versions and schemas, records from here.
"""

import contextlib
import json
import re
import socket
from unittest import mock

from language_tasks import as_bytes, read, restored
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.tasks import language, offline, pretrain_text

# A record of each set in TFDS's schema.
RECORDS = {
    "mnli": {"premise": "It rained.  A lot.", "hypothesis": "“Wet”, é", "label": 2, "idx": 5},
    "rte": {"sentence1": "A is B.", "sentence2": "B?", "label": 1, "idx": 0},
    "qnli": {"question": "Is A B?", "sentence": "It is.", "label": 0, "idx": 0},
    "cola": {"sentence": "Him saw.", "label": 0, "idx": 0},
    "sst2": {"sentence": "a gem ", "label": 1, "idx": 0},
    "mrpc": {"sentence1": "A .", "sentence2": "B .", "label": 1, "idx": 0},
    "qqp": {"question1": "A?", "question2": "B?", "label": 0, "idx": 0},
    "stsb": {"sentence1": "A.", "sentence2": "B.", "label": 3.25, "idx": 0},
    "boolq": {"passage": "Ice -- it floats.\n", "question": "does ice float", "label": 1, "idx": 3},
    "squad": {
        "id": "testid",
        "title": "T",
        "context": "Some context.",
        "question": "A question?",
        "answers": {"text": ["The answer.", "Another answer."], "answer_start": [0, 3]},
    },
    "record": {
        "query": "It was @placeholder.",
        "entities": ["A", "B", "C"],
        "passage": "This is the passage\n@highlight\nAnother sentence.\n@highlight\n"
        "Third sentence.",
        "answers": ["A", "C"],
        "idx": {"passage": 1, "query": 2},
    },
    "xsum": {"document": "An article.\nIts  end.", "summary": "A summary."},
    "clinc150": {
        "text": "how 's the weather ?",
        "intent": 1,
        "domain": 2,
        "intent_name": "weather",
        "domain_name": "utility",
    },
    "c4": {
        "text": "Text of a page.\nIts second line.",
        "url": "u",
        "content-type": "c",
        "content-length": "1",
        "timestamp": "t",
    },
}
SQUAD, RECORD = RECORDS["squad"], RECORDS["record"]


class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set of TFDS, as one of its own modules has them."""

    __module__ = "tensorflow_datasets.text.prepared"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": [("key", {"text": "A text."})]}

    def _generate_examples(self):
        raise NotImplementedError


def test_a_set_of_tfds_is_prepared_with_what_is_installed(tmp_path):
    """For which TFDS imports what it does not ask for."""
    builder = Prepared(data_dir=tmp_path)
    builder.download_and_prepare()
    assert [x["text"] for x in builder.as_dataset("train").as_numpy_iterator()] == [b"A text."]


@contextlib.contextmanager
def tfds_with(records):
    """Has TFDS read records, {TFDS's split: [record]}, in the schema of the set that is asked."""

    def as_dataset(builder, split, **unused_kwargs):
        spec = builder.info.features.get_tensor_spec()
        return tf.data.Dataset.from_generator(lambda: records[split], output_signature=spec)

    policy = tfds.testing.MockPolicy.USE_CODE
    with (
        tfds.testing.mock_data(policy=policy, as_dataset_fn=as_dataset),
        # The mock has no counts.
        mock.patch.object(seqio.TfdsDataSource, "num_input_examples", return_value=None),
    ):
        yield


def texts(name, *records):
    """What a task makes of records, before tokenisation: dicts of str and lists."""
    task = seqio.TaskRegistry.get(language.task(name, "bytes"))
    with tfds_with({"train": records}):
        dataset = task.source.get_dataset("train", shuffle=False)
        examples = list(language.SPECS[name].texts(dataset).as_numpy_iterator())

    def plain(value):
        if isinstance(value, bytes):
            return value.decode()
        return [plain(v) for v in value.tolist()] if hasattr(value, "tolist") else value

    return [{key: plain(value) for key, value in example.items()} for example in examples]


def pairs(name, *records):
    return [(x["inputs"], x["targets"]) for x in texts(name, *records)]


# --- Texts. The goldens are derived by hand from T5's definition, unless they say where from. ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # T5 takes the fields in alphabetical order and changes no character of them.
        ("mnli", ("mnli hypothesis: “Wet”, é premise: It rained.  A lot.", "contradiction")),
        ("rte", ("rte sentence1: A is B. sentence2: B?", "not_entailment")),
        ("qnli", ("qnli question: Is A B? sentence: It is.", "entailment")),
        ("cola", ("cola sentence: Him saw.", "unacceptable")),
        ("sst2", ("sst2 sentence: a gem ", "positive")),
        ("mrpc", ("mrpc sentence1: A . sentence2: B .", "equivalent")),
        ("qqp", ("qqp question1: A? question2: B?", "not_duplicate")),
        ("stsb", ("stsb sentence1: A. sentence2: B.", "3.2")),  # 16.25 fifths
        ("boolq", ("boolq passage: Ice -- it floats.\n question: does ice float", "True")),
        # T5's preprocessors_test.py, test_squad.
        ("squad", ("question: A question ? context: Some context . ", "The answer . ")),
        ("xsum", ("summarize: An article.\nIts  end.", "A summary.")),
        ("clinc150", ("clinc150: how 's the weather ?", "weather")),
    ],
)
def test_a_record_of_tfds_becomes_t5s_text(name, expected):
    assert pairs(name, RECORDS[name]) == [expected]


CLASSES = ("mnli", "rte", "qnli", "cola", "sst2", "mrpc", "qqp", "boolq")


@pytest.mark.parametrize(
    ("label", "text"), [(0.0, "0.0"), (5.0, "5.0"), (2.8, "2.8"), (3.7, "3.6"), (1.1, "1.2")]
)
def test_scores_of_stsb_are_in_steps_of_a_fifth(label, text):
    """Half a step (3.7 is 18.5 fifths, 1.1 is 5.5) as float32 has it, to the even fifth."""
    ((_, target),) = pairs("stsb", RECORDS["stsb"] | {"label": label})
    assert target == text


@pytest.mark.parametrize("name", CLASSES)
def test_labels_are_those_of_tfds_in_its_order(name):
    spec = language.SPECS[name]
    with tfds_with({}):
        labels = tfds.builder(spec.tfds_name).info.features["label"].names
    found = pairs(name, *(RECORDS[name] | {"label": i} for i in range(len(labels))))
    assert [target for _, target in found] == labels


def test_squad_sets_punctuation_off_and_keeps_all_answers():
    # T5's preprocessors_test.py: test_squad, test_pad_punctuation, test_pad_punctuation_i18n.
    (example,) = texts("squad", SQUAD)
    assert example["answers"] == ["The answer . ", "Another answer . "]
    question = '"This  is a string with "punctuation (1845-1986) ".'
    answers = {"text": ['"Introducción (la vídeo)".'], "answer_start": [0]}
    odd = SQUAD | {"question": question, "context": "\ta_b \u2014 c\n", "answers": answers}
    expected = ' " This is a string with " punctuation ( 1845 - 1986 ) " . '
    # By hand: single spaces also where the parts meet; a dash outside of ASCII is left alone.
    inputs = f"question:{expected}context: a _ b \u2014 c "
    assert pairs("squad", odd) == [(inputs, ' " Introducción ( la vídeo ) " . ')]


def test_record_has_an_example_for_each_answer():
    # T5's preprocessors_test.py, test_record.
    inputs = (
        "record query: It was @placeholder. entities: A, B, C passage: This is the passage. "
        "Another sentence. Third sentence."
    )
    shared = {"inputs": inputs, "answers": ["A", "C"], "group": [1, 2]}
    assert texts("record", RECORD) == [{**shared, "targets": answer} for answer in ("A", "C")]
    # Each record keeps its own numbers.
    other = RECORD | {"answers": ["B"], "idx": {"passage": 1, "query": 3}}
    assert [x["group"] for x in texts("record", RECORD, other)] == [[1, 2], [1, 2], [1, 3]]


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        # By hand from T5's two rules: a mark that ends a sentence stays, others get ". ".
        ("a.\n@highlight\nb", "a. b"),
        ("a?\n@highlight\nb!\n@highlight\nc", "a? b! c"),
        ("a\"\n@highlight\nb'\n@highlight\nc", "a\" b' c"),
        ("a;\n@highlight\nb", "a;. b"),
        ("\n@highlight\nb", ". b"),
        ("a\n@highlight b\n@highlight", "a\n@highlight b\n@highlight"),  # No line of its own.
        # The line end between two highlights belongs to the first of them.
        ("a\n@highlight\n@highlight\nb", "a. @highlight\nb"),
    ],
)
def test_highlights_of_record_become_sentences(passage, expected):
    ((inputs, _), *_) = pairs("record", RECORD | {"passage": passage})
    assert inputs.split(" passage: ")[1] == expected


def test_what_has_no_answer_is_an_error():
    for name in CLASSES:  # As in the test splits.
        with pytest.raises(tf.errors.InvalidArgumentError, match="-1 is not in"):
            texts(name, RECORDS[name] | {"label": -1})
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"no answer.*\[1 2\]"):
        texts("record", RECORD | {"answers": []})
    with pytest.raises(tf.errors.InvalidArgumentError, match="index 0"):
        texts("squad", SQUAD | {"answers": {"text": [], "answer_start": []}})


# --- Registering. ---


@pytest.mark.parametrize("name", RECORDS)
def test_registering_reads_nothing_and_the_splits_are_known(name, monkeypatch):
    def refuse(*args, **unused_kwargs):
        raise AssertionError(f"Registering must not call this: {args}")

    for owner, function in ((tfds, "load"), (tfds, "builder"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, function, refuse)
    task = seqio.TaskRegistry.get(language.task(name, "bytes"))
    expected = {"train", "validation"}
    expected |= {"xsum": {"test"}, "mnli": {"validation_mismatched"}}.get(name, set())
    if name == "clinc150":
        expected |= {"test", "oos_train", "oos_validation", "oos_test"}
    assert set(task.splits) == expected
    with pytest.raises(ValueError, match="no split 'test2'"):
        read(task.name, "test2")
    with pytest.raises(AssertionError, match="must not call"):  # So the reading would be noticed.
        task.source.get_dataset("train")


def write_seqio_cache(folder, examples):
    """What seqio's own program writes for the split "train", which needs Apache Beam."""
    folder.mkdir()
    described = {
        key: {"dtype": tensor.dtype.name, "shape": [None] * tensor.shape.rank}
        for key, tensor in examples[0].items()
    }
    info = {"features": described, "num_shards": 1, "seqio_version": seqio.__version__}
    (folder / "info.train.json").write_text(json.dumps(info))
    (folder / "stats.train.json").write_text(json.dumps({"examples": len(examples)}))
    with tf.io.TFRecordWriter(str(folder / "train.tfrecord-00000-of-00001")) as writer:
        for example in examples:
            features = {}
            for key, tensor in example.items():
                values = np.ravel(tensor.numpy()).tolist()
                kind = "bytes_list" if tensor.dtype == tf.string else "int64_list"
                features[key] = {kind: {"value": values}}
            given = tf.train.Features(
                feature={k: tf.train.Feature(**x) for k, x in features.items()}
            )
            writer.write(tf.train.Example(features=given).SerializeToString())
    (folder / "COMPLETED").touch()


def test_tokens_that_seqio_has_cached_are_read_in_the_place_of_tfds(tmp_path, monkeypatch):
    name = language.task("rte", "bytes")
    task, lengths = seqio.get_mixture_or_task(name), {"inputs": 100, "targets": 100}
    with tfds_with({"train": [RECORDS["rte"]]}):
        expected = [*task.get_dataset(lengths, "train", shuffle=False).as_numpy_iterator()]
        tokens = [*task.preprocess_precache(task.source.get_dataset("train", shuffle=False))]
    write_seqio_cache(tmp_path / name, tokens)
    monkeypatch.setattr(seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [str(tmp_path)])
    cached = task.get_dataset(lengths, "train", shuffle=False, use_cached=True)
    for found in (*cached.as_numpy_iterator(), *expected):
        assert found["inputs"].tolist() == expected[0]["inputs"].tolist()
        assert found["targets"].tolist() == expected[0]["targets"].tolist()


@pytest.mark.parametrize(
    ("name", "split", "of_tfds"),
    [
        ("mnli", "validation", "validation_matched"),
        ("mnli", "validation_mismatched", "validation_mismatched"),
        ("clinc150", "validation", "validation"),
        ("clinc150", "oos_validation", "validation_oos"),
        ("clinc150", "oos_test", "test_oos"),
    ],
)
def test_splits_are_read_from_those_of_tfds(name, split, of_tfds):
    with tfds_with({of_tfds: [RECORDS[name]]}):  # Any other split is a KeyError.
        assert len(read(language.task(name, "bytes"), split)) == 1
        builder = tfds.builder(language.SPECS[name].tfds_name)
    downloads = mock.Mock(download_and_extract=lambda _: "folder")
    assert of_tfds in [str(generator.name) for generator in builder._split_generators(downloads)]


def test_a_task_is_registered_once_for_its_arguments(tmp_path):
    names = [
        language.task("clinc150", "bytes"),
        language.task("clinc150", "bytes", str(tmp_path)),
        language.task("clinc150", offline.VOCABULARY_FILE),
    ]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"clinc150(_\d+)?", name) for name in names)
    task = seqio.TaskRegistry.get(names[0])
    assert language.task("clinc150", "bytes") == names[0]
    assert seqio.TaskRegistry.get(names[0]) is task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnlli", "bytes"), r"no language task 'mnlli', only \['banking77', .*'xsum'\]"),
        (("mnli", "bytes", "here"), r"'mnli' reads no directory.*'here'.*glue/mnli:2"),
        (("banking77", "bytes"), "'banking77' is not in TFDS: it needs the directory"),
        (("mnli", "nowhere"), "No vocabulary 'nowhere'"),
    ],
)
def test_what_cannot_be_registered_is_named(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        language.task(*arguments)


# --- Metrics, as `coda evaluate` computes them. ---


def evaluate(name, records, answer):
    """The metrics of a validation split whose example number i is answered by answer(i)."""
    task = seqio.TaskRegistry.get(language.task(name, "bytes"))

    def predict(dataset):
        numbers = [int(i) for i, _ in dataset]
        return [(i, (as_bytes(answer(i)) + [0] * 64)[:64]) for i in numbers]

    with tfds_with({"validation": records, "validation_matched": records}):
        evaluator = seqio.Evaluator(task.name, seqio.EncDecFeatureConverter(pack=False))
        found, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    (values,) = found.result().values()
    return {metric: float(value) for metric, value in values.items()}


def approx(**values):
    return {name: pytest.approx(value, abs=1e-4) for name, value in values.items()}


def test_classes_are_scored_by_accuracy():
    records = [RECORDS["mnli"] | {"label": i} for i in (0, 1, 2, 2)]
    assert evaluate("mnli", records, lambda _: " contradiction\n") == {"accuracy": 50}


def test_glue_is_scored_as_t5_does():
    """By hand: what is no label is the wrong one in F1, and a class of its own in Matthews'."""
    records = [RECORDS["mrpc"] | {"label": i} for i in (1, 1, 0, 0)]
    answers = ["equivalent", "none", "not_equivalent", "none"]  # 1 hit, 1 miss, 1 false alarm
    assert evaluate("mrpc", records, answers.__getitem__) == approx(f1=50, accuracy=50)
    records = [RECORDS["cola"] | {"label": i} for i in (1, 1, 0, 0)]
    answers = ["acceptable", "acceptable", "unacceptable", "acceptable"]
    # (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)) = 2 / sqrt(12)
    found = evaluate("cola", records, answers.__getitem__)
    assert found == approx(matthews_corrcoef=100 * 2 / 12**0.5)
    records = [RECORDS["stsb"] | {"label": x} for x in (1.0, 2.0, 4.0)]
    found = evaluate("stsb", records, ["2.0", "what", "3.0"].__getitem__)
    # (2, -1, 3) against (1, 2, 4): centred (2, -7, 5) / 3 and (-4, -1, 5) / 3; ranks (2, 1, 3).
    assert found == approx(pearson_corrcoef=100 * 24 / (78 * 42) ** 0.5, spearman_corrcoef=50)


def test_squad_is_scored_on_all_answers():
    # The second of the first record's answers is met; half of the second's: P = 1, R = 1/2.
    records = [SQUAD, SQUAD | {"answers": {"text": ["my reply"], "answer_start": [0]}}]
    found = evaluate("squad", records, ["another ANSWER", "reply"].__getitem__)
    assert found == approx(em=50, f1=100 * (1 + 2 / 3) / 2)


def test_record_is_scored_once_for_each_query():
    # Three examples; the first two are of one query, to which C is an answer.
    other = RECORD | {"answers": ["B"], "idx": {"passage": 1, "query": 3}}
    assert evaluate("record", [RECORD, other], ["C", "C", "x"].__getitem__) == approx(em=50, f1=50)


def test_summaries_are_scored_by_rouge():
    # P = 1 and R = 2/3 of the words, P = 1 and R = 1/2 of the pairs.
    found = evaluate("xsum", [RECORDS["xsum"] | {"summary": "the cat sat"}], lambda _: "the cat")
    assert found == approx(rouge1=80, rouge2=200 / 3, rougeLsum=80)


# --- Span corruption. ---


def test_c4_and_any_set_with_texts_are_corrupted():
    records = [RECORDS["c4"], RECORDS["c4"] | {"text": "Ü and more of it."}]
    expected = as_bytes("".join(record["text"] for record in records))[:-1]
    vocabulary = ByteVocabulary()
    with tfds_with({"validation": records, "train": records * 20}):
        (example,) = read(language.task("c4", "bytes"), "validation")
        own = read(pretrain_text.task("bytes", tfds_name="c4/en:3.1.0"), "train")
        with pytest.raises(ValueError, match=r"TEXT_FIELD='body' is no text of .*'text'"):
            read(pretrain_text.task("bytes", tfds_name="c4/en:3.1.0", field="body"), "train")
    parts = (example[key][:-1] for key in ("inputs", "targets"))
    assert restored(*parts, vocabulary.sentinel_ids) == expected
    assert own and all(258 in example["inputs"] for example in own)
