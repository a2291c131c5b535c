"""Span corruption and UL2's denoisers over texts of one's own."""

import json
import pathlib
import sysconfig

from hypothesis import given, settings
from hypothesis import strategies as st
from language_tasks import read, restored
import numpy as np
import pytest
import seqio
import tensorflow as tf

from coda_jax import bundled
from coda_jax.data import seqio_tasks
from coda_jax.data.vocabularies import load_vocabulary
from coda_jax.tasks import preprocessors, pretrain_text, ul2

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tokenizers"
VOCABULARIES = {
    "spiece": str(bundled.VOCABULARY),
    "tokenizer": str(GOLDEN / "unigram_4"),  # with ten sentinels
    "bytes": "bytes",
}
LENGTHS = {"inputs": 128, "targets": 64}
EQUAL = {"inputs": 128, "targets": 128}
STDLIB = pathlib.Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module", name="folder")
def fixture_folder(tmp_path_factory):
    """Real texts of some hundred records."""
    folder = tmp_path_factory.mktemp("texts")
    for path in sorted(STDLIB.glob("[a-d]*.py")):
        (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


def source_texts(name, split):
    """The texts that a task, or the first of a mixture, reads."""
    (task, *_) = seqio.get_subtasks(seqio.get_mixture_or_task(name))
    records = task.source.get_dataset(split, shuffle=False).as_numpy_iterator()
    return [record["text"].decode() for record in records]


def as_text(examples, vocabulary):
    """The ids that examples were made of, one after the other."""
    found = []
    for example in examples:
        inputs, targets = (example[key] for key in ("inputs", "targets"))
        assert inputs[-1] == targets[-1] == vocabulary.eos_id
        found += restored(inputs[:-1], targets[:-1], vocabulary.sentinel_ids)
    return found


def segments(texts, encode, length):
    """The ids of texts, in groups, without one that is alone at the end of a group."""
    found = []
    for start in range(0, len(texts), 128):
        group = [i for text in texts[start : start + 128] for i in encode(text)]
        found += group[:-1] if len(group) % length == 1 else group
    return found


def tf_encode(path):
    """TensorFlow's SentencePiece may divide long runs of spaces in another way than ours."""
    vocabulary = seqio_tasks.seqio_vocabulary(path)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return lambda text: vocabulary.encode_tf(text).numpy().tolist()
    return vocabulary.encode


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_inputs_and_targets_together_are_the_texts(kind, folder):
    path = VOCABULARIES[kind]
    vocabulary = load_vocabulary(path)
    name = pretrain_text.task(path, files=folder)
    found = read(name, "validation", lengths=LENGTHS)
    mean = 20 if kind == "bytes" else 3
    length, _ = preprocessors.random_spans_helper(128, 0.15, mean)
    assert as_text(found, vocabulary) == segments(
        source_texts(name, "validation"), tf_encode(path), length
    )
    full = [x for x in found if len(x["inputs"]) == 128]
    assert len(full) >= len(found) - 1 - len(source_texts(name, "validation")) // 128
    noise, spans = round(0.15 * length), round(round(0.15 * length) / mean)
    assert {len(x["targets"]) for x in full} == {noise + spans + 1}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.all] * (kind == "tokenizer")) for kind in VOCABULARIES],
)
@settings(max_examples=30, deadline=None)
@given(text=st.text(min_size=5, max_size=400), seed=st.integers(0, 2**30))
def test_any_text_is_restored_from_its_corruption(kind, text, seed):
    path = VOCABULARIES[kind]
    vocabulary, plain = seqio_tasks.seqio_vocabulary(path), load_vocabulary(path)
    # Of bytes, a character that is as rare as a sentinel may stand where one is looked for.
    text = "".join(c for c in text if ord(c) < 0x110000 and not 0xD800 <= ord(c) < 0xE000)
    ids = [i for i in tf_encode(path)(text) if i not in plain.sentinel_ids]
    if len(ids) < 2:
        return
    features = {"targets": seqio.Feature(vocabulary)}
    with seqio.utils.map_seed_manager(seed):
        dataset = tf.data.Dataset.from_tensors({"targets": tf.constant(ids, tf.int32)})
        (found,) = preprocessors.denoise(dataset, features, 0.1, 20.0).as_numpy_iterator()
    inputs, targets = (found[key].tolist() for key in ("inputs", "targets"))
    assert restored(inputs, targets, plain.sentinel_ids) == ids


def test_density_and_spans_may_be_chosen(folder):
    name = pretrain_text.task("bytes", files=folder, noise_density=0.3, mean_noise_span_length=6)
    example = read(name, "validation", lengths=EQUAL)[0]
    length, needed = preprocessors.random_spans_helper(128, 0.3, 6.0)
    assert (len(example["inputs"]), len(example["targets"])) == (128, needed)
    spans = sum(i in range(240, 259) for i in example["targets"])
    assert spans == round(0.3 * length / 6)


# --- UL2. ---


def test_the_seven_denoisers_are_ul2s():
    """Table 1 of the paper, and the modes that the public checkpoints know."""
    rows = [(d.mode, d.noise_density, d.mean_noise_span_length) for d in ul2.DENOISERS.values()]
    assert sorted(rows, key=str) == sorted(
        [
            *[("[NLU]", 0.15, mean) for mean in (3.0, 8.0)],
            ("[S2S]", 0.25, None),
            *[("[NLG]", 0.5, mean) for mean in (3.0, 8.0, 64.0)],
            ("[NLG]", 0.15, 64.0),
        ],
        key=str,
    )


@pytest.mark.parametrize("kind", ["spiece", "bytes"])
@pytest.mark.parametrize(
    "denoiser",
    [pytest.param(x, marks=[pytest.mark.all] * (x == "x_64_sparse")) for x in ul2.DENOISERS],
)
def test_each_denoiser_restores_the_text_and_masks_its_share(denoiser, kind, folder):
    path, row = VOCABULARIES[kind], ul2.DENOISERS[denoiser]
    vocabulary, encode = load_vocabulary(path), tf_encode(path)
    name = pretrain_text.task(path, files=folder, denoisers="ul2")
    tasks = {task.name: task for task in seqio.MixtureRegistry.get(name).tasks}
    lengths = {"inputs": 512, "targets": 512}
    examples = read(f"{name}_{denoiser}", "validation", lengths=lengths)
    mode = encode(row.mode)
    assert all(x["inputs"][: len(mode)] == mode for x in examples)
    bare = [{**x, "inputs": x["inputs"][len(mode) :]} for x in examples]
    texts = source_texts(name, "validation")
    if row.mean_noise_span_length is None:
        found = [i for x in bare for i in x["inputs"][:-1] + x["targets"][:-1]]
        assert found == segments(texts, encode, 512 - len(mode))
        shares = [(len(x["targets"]) - 1) / (sum(map(len, x.values())) - 2) for x in bare]
        assert max(shares) <= 0.5 and len({*shares}) > 10
        assert abs(np.mean(shares) - 0.25) < 4 * 0.145 / len(shares) ** 0.5
    else:
        noise = (row.noise_density, row.mean_noise_span_length)
        length, needed = preprocessors.random_spans_helper(512 - len(mode), *noise, 100)
        assert as_text(bare, vocabulary) == segments(texts, encode, length)
        assert max(len(x["targets"]) for x in bare) == needed <= 512
        spans = round(round(length * noise[0]) / noise[1])
        assert spans <= 100 and needed == round(length * noise[0]) + spans + 1
        # Only the spans of 3 of half the text are more than there are sentinels.
        longest = max(len(x["inputs"]) for x in examples)
        assert longest == 512 or (denoiser == "x_3" and spans == 100)
    assert len(tasks) == 7 and f"{name}_{denoiser}" in tasks


@pytest.mark.all
def test_the_denoisers_have_equal_rates_and_are_mixed(folder):
    name = pretrain_text.task("bytes", files=folder, denoisers="ul2")
    mixture = seqio.MixtureRegistry.get(name)
    assert {mixture.get_rate(task) for task in mixture.tasks} == {1.0}
    examples = seqio_tasks.seqio_examples(
        name,
        "train",
        feature_lengths={"inputs": 512, "targets": 512},
        seed=0,
        shuffle=True,
        num_epochs=None,
    )
    modes = [bytes(i - 3 for i in next(examples)["inputs"][:5]).decode() for _ in range(300)]
    assert 60 < modes.count("[NLU]") < 115 and 20 < modes.count("[S2S]") < 70
    assert modes.count("[NLG]") == 300 - modes.count("[NLU]") - modes.count("[S2S]")


def test_lengths_that_are_too_short_for_a_denoiser_are_refused(folder):
    name = pretrain_text.task("bytes", files=folder, denoisers="ul2")
    with pytest.raises(ValueError, match=r"have targets of length \d+, but the targets length is"):
        read(name, "validation")
    with pytest.raises(ValueError, match="inputs length of at least 9"):
        read(f"{name}_s", "validation", lengths={"inputs": 6, "targets": 6})


# --- What all have. ---


@pytest.mark.all
def test_examples_follow_the_seed(folder):
    name = pretrain_text.task("bytes", files=folder)
    one = read(name, "train", seed=1, shuffle=True, lengths=LENGTHS)
    assert one == read(name, "train", seed=1, shuffle=True, lengths=LENGTHS)
    assert one != read(name, "train", seed=2, shuffle=True, lengths=LENGTHS)


def test_a_task_is_registered_once_for_its_arguments(folder):
    name = pretrain_text.task("bytes", files=folder)
    assert pretrain_text.task("bytes", files=folder) == name
    others = [
        pretrain_text.task("bytes", files=folder, noise_density=0.2),
        pretrain_text.task(VOCABULARIES["spiece"], files=folder),
        pretrain_text.task("bytes", files=folder, denoisers="ul2"),
    ]
    assert len({name, *others}) == 4


def test_a_mixture_of_seqio_keeps_its_rates(folder):
    inner = [pretrain_text.task("bytes", files=folder, noise_density=x) for x in (0.1, 0.2)]
    seqio.MixtureRegistry.add("inner", [*zip(inner, (1.0, 3.0), strict=True)])
    name = pretrain_text.task("bytes", seqio_name="inner")
    mixture = seqio.MixtureRegistry.get(name)
    assert sorted(mixture.get_rate(task) for task in mixture.tasks) == [1.0, 3.0]
    assert read(name, "train", lengths=LENGTHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denoisers": "ul3"}, "DENOISERS must be one of .'span_corruption', 'ul2'., got 'ul3'"),
        ({"noise_density": 1.0}, "NOISE_DENSITY must be a number above 0 and below 1, got 1.0"),
        ({"mean_noise_span_length": 0}, "MEAN_NOISE_SPAN_LENGTH must be a number of at least 1"),
        ({"denoisers": "ul2", "noise_density": 0.2}, "'ul2' has densities and spans of its own"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options, message, folder):
    with pytest.raises(ValueError, match=message):
        pretrain_text.task("bytes", files=folder, **options)


def test_a_vocabulary_without_sentinels_is_refused(tmp_path, folder):
    spiece, tokenizer = tmp_path / "spiece", tmp_path / "tokenizer"
    spiece.mkdir()
    (spiece / "spiece.model").write_bytes((bundled.VOCABULARY / "spiece.model").read_bytes())
    (spiece / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
    tokenizer.mkdir()
    text = (GOLDEN / "byte_bpe_5" / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(text.replace("<extra_id_", "<other_"))
    for path in (spiece, tokenizer):
        with pytest.raises(ValueError, match=rf"VOCABULARY='{path}' has no sentinels"):
            pretrain_text.task(str(path), files=folder)


def test_texts_of_a_token_are_left_out_and_nothing_else_is_refused(tmp_path):
    lines = [json.dumps({"text": text}) for text in ["x"] * 40 + [f"{i} long" for i in range(40)]]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines))
    found = read(pretrain_text.task("bytes", files=str(file)), "train", lengths=LENGTHS)
    assert not any(i == ord("x") + 3 for e in found for x in e.values() for i in x)
    file.write_text("\n".join(json.dumps({"text": c}) for c in "abcdefghijkl"))
    name = pretrain_text.task("bytes", files=(str(file),))
    with pytest.raises(ValueError, match=r"a\.jsonl.*: no text has two tokens, of which one"):
        read(name, "train", lengths=LENGTHS)


def test_a_bad_file_is_an_error_of_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(ValueError, match=r"a\.txt:2: not UTF-8") as error:
        read(pretrain_text.task("bytes", files=str(tmp_path)), "train")
    assert len(str(error.value).splitlines()) == 1
