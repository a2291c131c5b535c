"""Tests of the offline tasks: no held-out text leaks, and the noise is T5's."""

import collections
import re

from language_tasks import restored
import numpy as np
import pytest
import seqio
import tensorflow as tf

from coda_jax.data import seqio_tasks
from coda_jax.data.seqio_vocabularies import plain_vocabulary
from coda_jax.tasks import offline, preprocessors, stdlib_corpus

SUPERVISED = (
    "stdlib_function_name",
    "stdlib_docstring",
    "stdlib_summary",
    "stdlib_passage",
    "stdlib_siblings",
)
LENGTHS = {"inputs": 128, "targets": 64}


@pytest.fixture(scope="module")
def corpus():
    return stdlib_corpus.read_corpus()


@pytest.fixture(scope="module")
def vocabulary():
    return seqio_tasks.task_vocabulary("stdlib_module")


def records(task, split):
    """The texts of a task before tokenisation, as dicts of str."""
    dataset = seqio.TaskRegistry.get(task).source.get_dataset(split, shuffle=False)
    return [{k: v.decode() for k, v in x.items()} for x in dataset.as_numpy_iterator()]


def examples(task, split, seed=0, num_epochs=1, lengths=LENGTHS):
    return list(
        seqio_tasks.seqio_examples(
            task, split, feature_lengths=lengths, seed=seed, shuffle=False, num_epochs=num_epochs
        )
    )


def merge(example, vocabulary):
    """Undoes span corruption."""
    parts = (example[key].tolist()[:-1] for key in ("inputs", "targets"))
    return restored(*parts, plain_vocabulary(vocabulary).sentinel_ids)


def cut(texts, vocabulary, mean_span=3.0, group=128):
    """The tokens of texts, without those that are alone at the end of a group: nothing to mask."""
    num_tokens, _ = preprocessors.random_spans_helper(LENGTHS["inputs"], 0.15, mean_span)
    found = []
    for start in range(0, len(texts), group):
        tokens = [vocabulary.encode_tf(text).numpy() for text in texts[start : start + group]]
        tokens = np.concatenate(tokens).tolist()
        found += tokens[:-1] if len(tokens) % num_tokens == 1 else tokens
    return found


def merge_all(many, vocabulary):
    return [token for example in many for token in merge(example, vocabulary)]


# --- Nothing held out is in the pretraining data. ---


@pytest.mark.all
def test_no_held_out_source_is_in_a_supervised_pretraining_task(corpus):
    def text(*tasks):
        inputs = {r["inputs"].split(": ", 1)[1] for task in tasks for r in records(task, "train")}
        return stdlib_corpus.normalized("\n".join(sorted(inputs)))

    masked = text("stdlib_function_name", "stdlib_siblings")
    plain, undocumented = text("stdlib_summary"), text("stdlib_docstring")
    for f in corpus.functions:
        if f.split == "train":
            continue
        for source, searched in (
            (offline.mask_name(f.source, f.name), masked),
            (f.source, plain),
            (f.undocumented, undocumented),
        ):
            # What is left of a short function without its docstring may be anyone's.
            if source and len(source) >= stdlib_corpus.MIN_BYTES:
                assert stdlib_corpus.normalized(source) not in searched, (f.file, f.qualname)


@pytest.mark.all
@pytest.mark.parametrize("task", ["stdlib_module", "stdlib_module_known"])
def test_windows_of_functions_are_of_the_training_functions(task):
    assert set(seqio.TaskRegistry.get(f"{task}_windows").splits) == {"train"}
    windowed, whole = (records(name, "train") for name in (f"{task}_windows", task))
    assert [{**r, "inputs": "module: " + r["inputs"]} for r in windowed] == whole


@pytest.mark.all
def test_passages_hold_neither_held_out_functions_nor_the_summary(corpus):
    inputs = [record["inputs"] for record in records("stdlib_passage", "train")]
    text = stdlib_corpus.normalized("".join(inputs))

    def shown(functions):
        return [f.qualname for f in functions if stdlib_corpus.normalized(f.source) in text]

    assert not shown(f for f in corpus.functions if f.split != "train")
    train = [f for f in corpus.functions if f.split == "train"][::50]
    assert len(shown(train)) > 0.9 * len(train)
    for file in corpus.files:
        if file.summary and len(file.summary) > 50:
            assert file.undocumented.count(file.summary) == file.text.count(file.summary) - 1


def test_passages_are_whole_lines_of_at_least_a_size_and_together_the_text(corpus):
    text = corpus.files[3].text
    for size in (1, 100, 10_000_000):
        found = offline.passages(text, size)
        assert "".join(found) == text
        for passage in found[:-1]:
            lines = passage.splitlines(keepends=True)
            assert len(passage.encode()) >= size > len("".join(lines[:-1]).encode())
    assert offline.passages("", 5) == []


@pytest.mark.all
def test_no_held_out_source_is_in_the_span_corruption(corpus, vocabulary):
    lengths = {"inputs": 1024, "targets": 256}
    noised = examples("stdlib_span_corruption", "train", lengths=lengths)
    tokens = merge_all(noised, vocabulary)
    text = stdlib_corpus.normalized(vocabulary.tokenizer.decode(tokens))
    held_out = [f for f in corpus.functions if f.split != "train"]
    leaked = [f.qualname for f in held_out if stdlib_corpus.normalized(f.source) in text]
    assert not leaked
    # And the search does find what is there.
    train = [f for f in corpus.functions if f.split == "train"][::50]
    found = sum(stdlib_corpus.normalized(f.source) in text for f in train)
    assert found > 0.9 * len(train)


def test_pretraining_has_no_test_split_and_its_validation_no_test_functions(corpus):
    mixture = seqio.MixtureRegistry.get("stdlib_pretrain")
    assert {t.name for t in mixture.tasks} == {*SUPERVISED, "stdlib_span_corruption"}
    assert set(mixture.splits) == {"train", "validation"}
    validation = {f.source for f in corpus.functions if f.split == "validation"}
    assert {r["targets"] for r in records("stdlib_span_corruption", "validation")} == validation
    for task in ("stdlib_summary", "stdlib_passage"):
        for record in records(task, "validation")[::20]:
            assert any(record["inputs"].removeprefix("summary: ") in text for text in validation)


@pytest.mark.all
def test_siblings_and_summaries_name_no_held_out_function_and_not_the_module(corpus):
    by_masked = {offline.mask_name(f.source, f.name): f for f in corpus.functions}
    names = collections.defaultdict(set)
    for f in corpus.functions:
        if f.split == "train":
            names[f.file].add(f.name)
    for file in corpus.files:
        names[file.path].update(file.classes)
    for split in ("train", "validation"):
        for record in records("stdlib_siblings", split):
            f = by_masked[record["inputs"].removeprefix("siblings: ")]
            targets = record["targets"].split(" ")
            assert f.split == split
            assert f.name not in targets and f.module not in targets
            assert names[f.file].issuperset(targets)
    by_source = {f.source: f for f in corpus.functions}
    summaries = {file.path: file.summary for file in corpus.files}
    for record in records("stdlib_summary", "train"):
        f = by_source[record["inputs"].removeprefix("summary: ")]
        assert f.module.lower() not in re.findall(r"\w+", record["targets"].lower())
        if summaries[f.file] is None:
            defines, *some = record["targets"].split(" ")
            assert defines == "defines" and names[f.file].issuperset({*some} - {offline.SENTINEL})
        elif offline.SENTINEL not in record["targets"]:
            assert record["targets"] == summaries[f.file]


@pytest.mark.parametrize("task", ["stdlib_module", "stdlib_exception"])
def test_adaptation_tasks_ask_for_the_right_class(task, corpus):
    by_source = {f.source: f for f in corpus.functions}
    seen = {}
    for split in ("train", "validation", "test"):
        rows = records(task, split)
        assert rows
        for row in rows:
            prefix, source = row["inputs"].split(": ", 1)
            assert "stdlib_" + prefix == task
            f = by_source[source]
            assert f.split == split and seen.setdefault(source, split) == split
            if task == "stdlib_module":
                assert row["targets"] == f.file.split("/")[0].removesuffix(".py")
            else:
                assert f.exceptions == (row["targets"],)
    if task == "stdlib_module":
        sizes = collections.Counter(by_source[s].module for s in seen)
        assert min(sizes.values()) >= offline.MIN_CLASS_SIZE
        assert len(sizes) > 50


def test_known_and_held_out_modules_are_the_task_in_two_parts(corpus):
    for split in ("train", "validation"):
        parts = [records(f"stdlib_module_{part}", split) for part in ("known", "held_out")]
        known, held_out = ({row["targets"] for row in part} for part in parts)
        assert known.isdisjoint(held_out)
        rows = sorted(row["inputs"] for part in parts for row in part)
        assert rows == sorted(row["inputs"] for row in records("stdlib_module", split))
    assert len(offline.held_out_modules()) == round(0.25 * len(offline.module_classes()))
    docstrings = {f.docstring for f in corpus.functions if f.split == "validation"}
    rows = records("stdlib_module_docstrings", "validation")
    assert rows and {row["inputs"].removeprefix("module: ") for row in rows} <= docstrings


@pytest.mark.all
@pytest.mark.parametrize(
    ("task", "prefix"),
    [("stdlib_module_windows", "module: "), ("stdlib_passage", "summary: ")],
)
def test_windows_are_parts_of_training_texts_drawn_afresh(task, prefix, vocabulary):
    prefix = vocabulary.encode(prefix)
    texts = records(task, "train")
    windows = examples(task, "train", num_epochs=2)
    assert len(windows) == 2 * len(texts)
    starts = []
    for index in range(0, len(texts), 97):
        whole = vocabulary.encode_tf(texts[index]["inputs"]).numpy().tolist()
        for window in (windows[index], windows[index + len(texts)]):
            tokens = window["inputs"].tolist()
            assert tokens[: len(prefix)] == prefix and tokens[-1] == vocabulary.eos_id
            body = tokens[len(prefix) : -1]
            assert len(body) == min(len(whole), offline.WINDOW_TOKENS)
            found = [i for i in range(len(whole)) if whole[i : i + len(body)] == body]
            assert found and vocabulary.decode(window["targets"]) == texts[index]["targets"]
            starts.append(found[0])
    assert np.mean(np.array(starts[::2]) != starts[1::2]) > 0.7


def test_the_name_is_masked_wherever_it_stands_alone_and_becomes_a_sentinel(corpus, vocabulary):
    masked = offline.mask_name(
        "def run(self):\n    run(self.run, rerun, run_2)\n    x.run()", "run"
    )
    assert masked == (
        "def <extra_id_0>(self):\n    <extra_id_0>(self. <extra_id_0>, rerun, run_2)\n"
        "    x. <extra_id_0>()"
    )
    sentinel = vocabulary.vocab_size - 1
    for f in corpus.functions[::7]:
        text = offline.mask_name(f.source, f.name)
        tokens = vocabulary.encode(text)
        assert tokens.count(sentinel) == text.count(offline.SENTINEL) >= 1


def test_siblings_are_drawn_afresh_in_each_epoch():
    twice = examples("stdlib_siblings", "validation", num_epochs=2)
    first, second = twice[: len(twice) // 2], twice[len(twice) // 2 :]
    assert all(np.array_equal(a["inputs"], b["inputs"]) for a, b in zip(first, second, strict=True))
    same = [np.array_equal(a["targets"], b["targets"]) for a, b in zip(first, second, strict=True)]
    assert np.mean(same) < 0.2


def test_accuracy_is_the_share_of_exact_matches_after_stripping():
    task = seqio.TaskRegistry.get("stdlib_module")
    answers = [task.postprocess_fn(a) for a in (" re\n", "os", "json.x")]
    (metric,) = task.metric_fns
    assert metric(["re", "sys", "json"], answers) == {"accuracy": pytest.approx(100 / 3)}


# --- The vocabulary. ---


def test_the_vocabulary_is_lossless_and_short(corpus, vocabulary):
    assert (vocabulary.vocab_size, vocabulary.pad_id, vocabulary.eos_id) == (4096, 0, 1)
    sources = [f.source for f in corpus.functions if f.split == "test"]
    odd = ["", " a", "  b ", "\n\n\tx\f é 😀\n", "a   b", "os"]
    tokens = 0
    for text in sources + odd:
        ids = vocabulary.encode(text)
        tokens += len(ids)
        assert vocabulary.decode(ids) == text
        assert vocabulary.unk_id not in ids
    assert sum(len(s.encode()) for s in sources) / tokens > 3.5


def test_tensorflow_tokenises_as_python_does(corpus, vocabulary):
    for f in corpus.functions[::100]:
        in_graph = vocabulary.encode_tf(f.source).numpy().tolist()
        # Runs of more than 16 spaces have two best segmentations, in either order.
        assert sorted(in_graph) == sorted(vocabulary.encode(f.source))
        assert vocabulary.decode(in_graph) == f.source


def test_a_missing_vocabulary_is_an_error_that_says_how_to_make_it(tmp_path):
    missing = seqio.SentencePieceVocabulary(str(tmp_path / "spiece.model"))
    offline.add_tasks(missing, "_missing")
    try:
        source = seqio.TaskRegistry.get("stdlib_module_missing").source
        with pytest.raises(FileNotFoundError, match=r"spiece.model.*--write_vocabulary"):
            source.get_dataset("train", shuffle=False)
    finally:
        for task in seqio.MixtureRegistry.get("stdlib_pretrain_missing").tasks:
            seqio.TaskRegistry.remove(task.name)
        seqio.MixtureRegistry.remove("stdlib_pretrain_missing")
        for name in ("stdlib_module", "stdlib_module_windows", "stdlib_exception"):
            seqio.TaskRegistry.remove(name + "_missing")


@pytest.mark.all
def test_the_tasks_exist_for_bytes():
    task = seqio.TaskRegistry.get("stdlib_exception_bytes")
    (row, *_), (example, *_) = records(task.name, "test"), examples(task.name, "test")
    assert example["inputs"].tolist() == [*(b + 3 for b in row["inputs"].encode()), 1]
    noised = examples("stdlib_span_corruption_bytes", "validation")
    vocabulary = task.output_features["targets"].vocabulary
    texts = [r["targets"] for r in records("stdlib_span_corruption_bytes", "validation")]
    assert merge_all(noised, vocabulary) == cut(texts, vocabulary, mean_span=20.0)


# --- Span corruption. ---


@pytest.mark.parametrize("length", [1, 2, 3, 10, 137, 568])
def test_noise_has_t5s_share_and_spans(length):
    masks = np.array(
        [
            preprocessors.random_spans_noise_mask(
                tf.constant(length), tf.constant([[seed, 0], [seed, 1]])
            )
            for seed in range(60)
        ]
    )
    assert masks.shape == (60, length)
    if length == 1:
        return
    noise = masks.sum(axis=1)
    spans = masks[:, 0] + (np.diff(masks.astype(int), axis=1) == 1).sum(axis=1)
    assert set(noise) == {max(round(0.15 * length), 1)}
    assert set(spans) == {max(round(noise[0] / 3), 1)}
    assert not masks[:, 0].any() and masks[:, -1].all()
    if length > 100:
        assert len(np.unique(masks, axis=0)) == 60
        inner = masks[:, 20:-20].mean(axis=0)  # No place is preferred.
        assert abs(inner[: len(inner) // 2].mean() - inner[len(inner) // 2 :].mean()) < 0.04


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [("bytes", [70, 258, 72, 257]), (offline.VOCABULARY_FILE, [70, 4095, 72, 4094])],
)
def test_sentinels_are_those_of_the_published_models(vocabulary, expected):
    """ByT5's are its last bytes, not its extra ids, which it never saw in pretraining."""
    found = preprocessors.noise_span_to_unique_sentinel(
        tf.constant([70, 71, 72, 73]),
        tf.constant([False, True, False, True]),
        seqio_tasks.seqio_vocabulary(vocabulary),
    )
    assert found.numpy().tolist() == expected


def test_lengths_before_noise_are_t5s():
    # The values of T5's own configuration: 512 inputs come from 568 tokens and have 114 targets.
    assert preprocessors.random_spans_helper(512) == (568, 114)
    for length in range(4, 300, 5):
        tokens, targets_length = preprocessors.random_spans_helper(length)
        mask = preprocessors.random_spans_noise_mask(tokens, tf.constant([[0, 1], [0, 2]])).numpy()
        spans = (np.diff(mask.astype(int)) == 1).sum()
        assert (~mask).sum() + spans + 1 == length
        assert mask.sum() + spans + 1 == targets_length


@pytest.mark.all
def test_inputs_and_targets_together_are_the_text(vocabulary):
    noised = examples("stdlib_span_corruption", "validation")
    texts = [r["targets"] for r in records("stdlib_span_corruption", "validation")]
    assert merge_all(noised, vocabulary) == cut(texts, vocabulary)
    lengths = collections.Counter(len(x["inputs"]) for x in noised)
    num_groups = -(-len(texts) // 128)
    assert lengths[LENGTHS["inputs"]] >= len(noised) - num_groups
    assert max(lengths) == LENGTHS["inputs"]
    for example in noised[:50]:
        sentinels = [t for t in example["inputs"].tolist() if t >= vocabulary.vocab_size - 100]
        assert sentinels == list(range(4095, 4095 - len(sentinels), -1))
        assert sentinels == [t for t in example["targets"].tolist() if t >= 4096 - 100]
        assert example["inputs"][-1] == example["targets"][-1] == vocabulary.eos_id


@pytest.mark.all
def test_the_noise_follows_the_seed_and_is_fresh_in_each_epoch(vocabulary):
    def tokens(seed):
        both = examples("stdlib_span_corruption", "validation", seed=seed, num_epochs=2)
        return [x["inputs"].tolist() for x in both], merge_all(both, vocabulary)

    noised, text = tokens(0)
    assert (noised, text) == tokens(0)
    other, same_text = tokens(1)
    assert same_text == text and other != noised
    assert text[: len(text) // 2] == text[len(text) // 2 :]
    assert len({tuple(x) for x in noised}) == len(noised)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"inputs": 512, "targets": 100}, "targets of length 114"),
        ({"inputs": 4096, "targets": 4096}, r"\d+ noise spans .* there are 100"),
        ({"inputs": 3, "targets": 64}, "at least 4: 3"),
        (None, "length of the inputs: None"),
    ],
)
def test_lengths_that_cannot_hold_the_noise_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        seqio.TaskRegistry.get("stdlib_span_corruption").get_dataset(lengths, "validation")
