"""Language tasks as seqio tasks: T5's text formats, and three sets of intents.

`task(name, vocabulary)` registers one of `SPECS` for a vocabulary. The texts of C4, GLUE,
BoolQ, SQuAD and ReCoRD are byte for byte those of the public T5 tasks (Raffel et al. 2020, arXiv
1910.10683, appendix D), and XSum's have the form of T5's other summaries, so that T5's checkpoints
know them. Test splits without labels, as MNLI's, are left out: a score would mean nothing.

The data come from TFDS, which downloads them into $TFDS_DATA_DIR when they are first read, or from
a folder. Registering reads neither. seqio can cache the tokens.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools

import seqio
import tensorflow as tf

from coda_jax.data import seqio_tasks
from coda_jax.ood.known import HeldOut
from coda_jax.tasks import intents, metrics, preprocessors, registry

SHUFFLE_BUFFER_SIZE = 1000  # records, of sets that may be too large for memory

_SPLITS = ("train", "validation", "test")
_Preprocessor = Callable[..., tf.data.Dataset]


# --- From records to texts. ---


def glue(record, name: str, fields: Sequence[str], labels: Sequence[str]):
    """T5's text of a GLUE or SuperGLUE record: "mnli hypothesis: ... premise: ...".

    Args:
        record: has the fields, and "label", an index. TFDS marks a missing label by -1: an error.
        name: the first word of the text.
        fields: in the order of the text; T5 sorts them.
        labels: the texts of the labels.

    Returns:
        {"inputs", "targets"}.
    """
    parts = [name]
    for field in fields:
        parts += [f"{field}:", record[field]]
    targets = tf.gather(list(labels), record["label"])
    return {"inputs": tf.strings.join(parts, " "), "targets": targets}


def stsb(record):
    """T5's text of an STS-B record: the target is the score in steps of 0.2, such as "3.8".

    Args:
        record: has "sentence1", "sentence2" and "label", 0 to 5.

    Returns:
        {"inputs", "targets"}.
    """
    parts = ["stsb sentence1:", record["sentence1"], "sentence2:", record["sentence2"]]
    score = tf.as_string(tf.round(record["label"] * 5) / 5, precision=1)
    return {"inputs": tf.strings.join(parts, " "), "targets": score}


def _spaced(text: tf.Tensor) -> tf.Tensor:
    """Puts a space on both sides of each ASCII punctuation mark, and makes one of any run."""
    return _single_spaces(tf.strings.regex_replace(text, "[[:punct:]]", r" \0 "))


def _single_spaces(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_replace(text, r"\s+", " ")


def squad(record):
    """T5's text of a SQuAD record: "question: ... context: ...", punctuation set off by spaces.

    Args:
        record: has "question", "context" and "answers" with at least one "text".

    Returns:
        {"inputs", "targets": the first answer, "answers": all of them, for the metric}.
    """
    parts = ["question:", _spaced(record["question"]), "context:", _spaced(record["context"])]
    answers = _spaced(record["answers"]["text"])
    inputs = _single_spaces(tf.strings.join(parts, " "))
    return {"inputs": inputs, "targets": answers[0], "answers": answers}


def record(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """T5's texts of ReCoRD: "record query: ... entities: ... passage: ..." for each right answer.

    The highlights below an article become sentences of it.

    Args:
        dataset: records with "passage", "query", "entities", "answers", and "idx" with the numbers
            of "passage" and "query"; one without an answer is an error.

    Returns:
        A dataset of {"inputs", "targets": one answer, "answers": all, "group": [2] int32 the two
        numbers}; the last two are for the metric.
    """

    def texts(x):
        number = tf.stack([x["idx"]["passage"], x["idx"]["query"]])
        has_answers = tf.size(x["answers"]) > 0
        tf.debugging.Assert(has_answers, ["ReCoRD: no answer to (passage, query)", number])
        passage = tf.strings.regex_replace(x["passage"], r"([.?!\"'])\n@highlight\n", r"\1 ")
        passage = tf.strings.regex_replace(passage, r"\n@highlight\n", ". ")
        entities = tf.strings.reduce_join(x["entities"], separator=", ")
        parts = ["record query:", x["query"], "entities:", entities, "passage:", passage]
        shared = {"inputs": tf.strings.join(parts, " "), "answers": x["answers"], "group": number}
        answers = tf.data.Dataset.from_tensor_slices(x["answers"])
        return answers.map(lambda answer: {**shared, "targets": answer})

    return dataset.flat_map(texts)


def prefixed(record, prefix: str, source: str, target: str):
    """The text of a set with one input, "<prefix>: <input>".

    Args:
        record: has the two fields.
        prefix: "summarize" for XSum as for T5's summaries; the name of the set for intents.
        source: the field with the input.
        target: the field with the summary or the intent's name.

    Returns:
        {"inputs", "targets"}.
    """
    inputs = tf.strings.join([f"{prefix}:", record[source]], " ")
    return {"inputs": inputs, "targets": record[target]}


# --- The tasks. ---


def _mapped(function: Callable, **kwargs) -> _Preprocessor:
    return seqio.map_over_dataset(functools.partial(function, **kwargs))


def _glue(name: str, fields: Sequence[str], labels: Sequence[str]) -> _Preprocessor:
    return _mapped(glue, name=name, fields=fields, labels=labels)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A set of intents as a folder of its authors' files.

    Attributes:
        read: (directory, split) -> the columns of the records.
        intent: the column of the intents.
        splits: that can be read.
    """

    read: intents.Reader
    intent: str
    splits: Sequence[str] = _SPLITS

    def source(self, directory: str, held_out: HeldOut) -> seqio.DataSource:
        """The records, without some intents, which are in splits of their own, where asked."""
        read, splits = self.read, tuple(self.splits)
        if held_out is not None:
            read = intents.without_some(read, self.intent, held_out)
            splits += tuple(intents.HELD_OUT + split for split in _SPLITS)
        return seqio_tasks.MemorySource(functools.partial(read, directory), splits)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row of `SPECS`.

    Attributes:
        texts: seqio preprocessor, from records to texts.
        tfds_name: name and version of the TFDS data set; None: only a folder is read.
        splits: those of TFDS, or a dict from the task's names of them to TFDS's.
        folder: how a folder is read; None: only TFDS is.
        noise: seqio preprocessor of tokens, if there is one.
        metric_fns: of seqio.
        postprocess: seqio's `postprocess_fn`.
    """

    texts: _Preprocessor
    tfds_name: str | None
    splits: Sequence[str] | Mapping[str, str] = ("train", "validation")
    folder: Folder | None = None
    noise: _Preprocessor | None = None
    metric_fns: Sequence[Callable] = (seqio_tasks.accuracy,)
    postprocess: Callable = seqio_tasks.strip_text


SPECS = {
    "c4": Spec(
        functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
        "c4/en:3.1.0",
        noise=preprocessors.span_corruption,
        metric_fns=(),
    ),
    "mnli": Spec(
        _glue("mnli", ("hypothesis", "premise"), ("entailment", "neutral", "contradiction")),
        "glue/mnli:2.0.0",
        splits={
            "train": "train",
            "validation": "validation_matched",
            "validation_mismatched": "validation_mismatched",
        },
    ),
    "rte": Spec(
        _glue("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
        "glue/rte:2.0.0",
    ),
    "qnli": Spec(
        _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        "glue/qnli:2.0.0",
    ),
    "cola": Spec(
        _glue("cola", ("sentence",), ("unacceptable", "acceptable")),
        "glue/cola:2.0.0",
        metric_fns=(metrics.matthews_of("unacceptable", "acceptable"),),
    ),
    "sst2": Spec(_glue("sst2", ("sentence",), ("negative", "positive")), "glue/sst2:2.0.0"),
    "mrpc": Spec(
        _glue("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
        "glue/mrpc:2.0.0",
        metric_fns=(metrics.f1_of("not_equivalent", "equivalent"), seqio_tasks.accuracy),
    ),
    "qqp": Spec(
        _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
        "glue/qqp:2.0.0",
        metric_fns=(metrics.f1_of("not_duplicate", "duplicate"), seqio_tasks.accuracy),
    ),
    "stsb": Spec(_mapped(stsb), "glue/stsb:2.0.0", metric_fns=(metrics.correlations,)),
    "boolq": Spec(
        _glue("boolq", ("passage", "question"), ("False", "True")), "super_glue/boolq:1.0.2"
    ),
    "squad": Spec(
        _mapped(squad),
        "squad/v1.1:3.0.0",
        metric_fns=(metrics.squad,),
        postprocess=metrics.all_answers,
    ),
    "record": Spec(
        record,
        "super_glue/record:1.0.2",
        metric_fns=(metrics.record,),
        postprocess=metrics.grouped_answers,
    ),
    "xsum": Spec(
        _mapped(prefixed, prefix="summarize", source="document", target="summary"),
        "xsum:1.1.0",
        splits=_SPLITS,
        metric_fns=(metrics.rouge,),
    ),
    "clinc150": Spec(
        _mapped(prefixed, prefix="clinc150", source="text", target="intent_name"),
        "clinc_oos:0.1.0",
        splits={s: s for s in _SPLITS} | {f"oos_{s}": f"{s}_oos" for s in _SPLITS},
        folder=Folder(intents.read_clinc, "intent_name", tuple(intents.CLINC_KEYS)),
    ),
    "banking77": Spec(
        _mapped(prefixed, prefix="banking77", source="text", target="category"),
        None,
        folder=Folder(intents.read_banking, "category"),
    ),
    "snips": Spec(
        _mapped(prefixed, prefix="snips", source="text", target="intent"),
        None,
        folder=Folder(intents.read_snips, "intent"),
    ),
}


def _source(name: str, directory: str | None, held_out: HeldOut) -> seqio.DataSource:
    spec = SPECS[name]
    if directory is None:
        if held_out is not None:
            raise ValueError(f"held_out={held_out!r} needs the directory of a set of intents")
        if spec.tfds_name is None:
            raise ValueError(f"{name!r} is not in TFDS: it needs the directory with its files")
        return seqio.TfdsDataSource(spec.tfds_name, splits=spec.splits)
    if spec.folder is None:
        raise ValueError(
            f"{name!r} reads no directory, so directory={directory!r} cannot be: it is read by "
            f"TFDS ({spec.tfds_name}), whose folder is $TFDS_DATA_DIR"
        )
    return spec.folder.source(directory, held_out)


def task(name: str, vocabulary: str, directory: str | None = None, held_out: HeldOut = None) -> str:
    """Registers a task, once, and returns the name that it has in seqio. For gin files.

    Args:
        name: a key of `SPECS`.
        vocabulary: a path, or "bytes", for `seqio_tasks.seqio_vocabulary`.
        directory: of the published files, for sets of intents; None: TFDS.
        held_out: intents that are missing in all splits, and alone in "held_out_train" and so on:
            a share, which is drawn once and for all, or their names.

    Returns:
        "<name>_<hash of the arguments>".

    Raises:
        ValueError: an unknown name, or a directory where none is read or none where one is needed.
        FileNotFoundError: there is no such vocabulary.
    """
    spec = registry.find("language", name, SPECS)
    held_out = tuple(held_out) if isinstance(held_out, list) else held_out
    source = _source(name, directory, held_out)

    def add(registered: str) -> seqio.Task:
        tokens = [spec.texts, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder()]
        return seqio_tasks.add_task(
            registered,
            source,
            [*tokens, spec.noise] if spec.noise else tokens,
            seqio_tasks.seqio_vocabulary(vocabulary),
            postprocess_fn=spec.postprocess,
            metric_fns=spec.metric_fns,
            shuffle_buffer_size=SHUFFLE_BUFFER_SIZE,
        )

    return registry.once(name, (name, vocabulary, directory, held_out), add)
