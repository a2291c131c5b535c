"""The commands for images: train, evaluate, predict, cache and convert of a tiny model."""

import json

from command_line import coda
from helpers import ADAPTER, TINY_IMAGES, config, random_params
import jax
import numpy as np
from PIL import Image
import pytest
import seqio

from coda_jax import checkpoints
from coda_jax.commands.convert import convert
from coda_jax.commands.loading import load_model
from coda_jax.data import seqio_tasks
from coda_jax.data.batches import batch_examples
from coda_jax.data.cache import read_cache, write_cache
from coda_jax.data.seqio_converters import VectorsFeatureConverter
from coda_jax.data.source import Data
from coda_jax.data.vocabularies import load_vocabulary
from coda_jax.methods import Coda
from coda_jax.models.pix2struct.config import Pix2StructConfig
from coda_jax.objectives import model_for
from coda_jax.tasks import images

TASK = "tiny_images"
LENGTHS = {"inputs": 12, "targets": 4}
CONFIG = config(base=TINY_IMAGES, vocab_size=384, num_encoder_layers=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of several shapes, and a task of 12 and 6 of them whose answer is the shape."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    columns = {}
    for split, count in (("train", 12), ("validation", 6)):
        columns[split] = {"image": [], "header": [""] * count, "targets": []}
        for number in range(count):
            high = number % 3 == 0
            pixels = rng.integers(0, 256, ((20, 6) if high else (6, 20)) + (3,), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{number}.png")
            columns[split]["image"].append(str(folder / f"{split}{number}.png"))
            columns[split]["targets"].append("h" if high else "w")
    images.add_task(
        TASK,
        seqio_tasks.MemorySource(columns.__getitem__, tuple(columns)),
        images.load_images(),
        seqio_tasks.seqio_vocabulary("bytes"),
        patch_size=TINY_IMAGES.patch_size,
    )
    yield columns
    seqio.TaskRegistry.remove(TASK)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny dense Pix2Struct of bytes."""
    directory = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save_hf(directory, CONFIG, random_params(CONFIG))
    return directory


@pytest.fixture(scope="module")
def shared(checkpoint):
    """What the commands share."""
    return {
        "MIXTURE_OR_TASK_NAME": TASK,
        "INITIAL_CHECKPOINT_PATH": checkpoint,
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": 4,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, files, shared):
    """A run of `coda train` with CoDA."""
    directory = tmp_path_factory.mktemp("run")
    given = {"MODEL_DIR": directory, "TRAIN_STEPS": 30, "ParallelAdapter.bottleneck": 4}
    coda("train", ["runs/finetune.gin", "methods/coda.gin"], shared | given)
    return directory


def test_train_exports_an_adapter_of_its_family(trained, checkpoint):
    cfg, _ = checkpoints.load_adapter(
        trained / "export" / "adapter", *checkpoints.load_hf(checkpoint)
    )
    assert isinstance(cfg, Pix2StructConfig)
    assert cfg.methods == (Coda(reduction=3), ADAPTER)
    assert json.loads((trained / "run.json").read_text())["config"]["family"] == "pix2struct"


def test_evaluate_agrees_with_the_evaluation_during_training(trained, shared, tmp_path):
    given = {
        "INITIAL_ADAPTER_PATH": trained / "export" / "adapter",
        "OUTPUT": tmp_path / "metrics.json",
        "Decoding.max_decode_length": 4,
    }
    coda("evaluate", ["runs/evaluate.gin"], shared | given)
    (metrics,) = json.loads((tmp_path / "metrics.json").read_text()).values()
    during = json.loads((trained / "metrics.json").read_text())
    assert metrics["accuracy"] == pytest.approx(100 * during["exact_match"], abs=1e-4)


def test_predict_answers_what_the_task_gives(trained, checkpoint, files, tmp_path):
    """The files of the validation split: patches and answers are those of the task."""
    paths = files["validation"]["image"]
    (tmp_path / "in.txt").write_text("\n".join(paths) + "\n")
    given = {
        "INITIAL_CHECKPOINT_PATH": checkpoint,
        "INITIAL_ADAPTER_PATH": trained / "export" / "adapter",
        "VOCABULARY": "bytes",
        "INPUT": tmp_path / "in.txt",
        "OUTPUT": tmp_path / "out.jsonl",
        "Decoding.max_input_length": 12,
        "Decoding.max_decode_length": 4,
        "BATCH_SIZE": 4,
    }
    coda("predict", ["runs/predict.gin"], given)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == paths
    adapter = str(trained / "export" / "adapter")
    found = load_model(str(checkpoint), adapter_checkpoint=adapter)
    asked = Data(LENGTHS, task=TASK, split="validation", batch_size=6, shuffle=False)
    (batch,) = asked.batches(repeat=False)
    model, vocabulary = model_for(found.config), load_vocabulary("bytes")
    predict = jax.jit(lambda inputs: model.predict(found.params, inputs, max_decode_length=4))
    rows = np.asarray(predict(batch["encoder_input_tokens"]))
    answers = [vocabulary.decode(row.tolist()) for row in rows]
    assert [line["prediction"] for line in lines] == answers


def test_a_cache_gives_the_batches_of_the_task(files, shared, tmp_path):
    path = str(tmp_path / "train.npz")
    given = {name: shared[name] for name in ("MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS")}
    coda("cache", ["runs/cache.gin"], given | {"OUTPUT": path})
    examples, metadata = read_cache(path)
    assert len(examples) == 12 and metadata["vocabulary"] == "bytes"
    cached, direct = (
        list(Data(LENGTHS, batch_size=5, shuffle=False, **source).batches(repeat=False))
        for source in ({"cache": path}, {"task": TASK})
    )
    assert len(cached) == len(direct) == 3
    for first, second in zip(cached, direct, strict=True):
        assert first["encoder_input_tokens"].dtype == np.float32
        for key, values in second.items():
            np.testing.assert_array_equal(first[key], values, err_msg=key)


def test_batches_equal_those_of_seqio(files):
    ours = batch_examples(
        seqio_tasks.seqio_examples(
            TASK, "train", feature_lengths=LENGTHS, seed=0, shuffle=False, num_epochs=1
        ),
        batch_size=4,
        feature_lengths=LENGTHS,
    )
    task = seqio.get_mixture_or_task(TASK)
    dataset = task.get_dataset(LENGTHS, "train", shuffle=False)
    converter = VectorsFeatureConverter(pack=False)
    theirs = converter(dataset, LENGTHS).batch(4).as_numpy_iterator()
    for first, second in zip(ours, theirs, strict=True):
        assert first.keys() == second.keys()
        for key, values in second.items():
            assert first[key].dtype == values.dtype
            np.testing.assert_array_equal(first[key], values, err_msg=key)


def test_a_run_is_converted(trained, checkpoint, tmp_path):
    convert(str(trained), str(tmp_path / "adapter"), "adapter", base=str(checkpoint))
    for name in ("adapter.safetensors", "adapter.json"):
        exported = (trained / "export" / "adapter" / name).read_bytes()
        assert (tmp_path / "adapter" / name).read_bytes() == exported


def test_texts_are_not_for_a_model_of_images(checkpoint, tmp_path):
    write_cache(
        tmp_path / "text.npz", [{"inputs": np.array([5, 1]), "targets": np.array([5, 1])}] * 4,
        {"vocabulary": "bytes", "vocab_size": 384},
    )  # fmt: skip
    text = Data(LENGTHS, cache=str(tmp_path / "text.npz"), batch_size=4)
    model = load_model(str(checkpoint), methods=(ADAPTER,))
    batch = next(iter(text.batches(repeat=True)))
    with pytest.raises(ValueError, match=r"pix2struct takes inputs \[B, N, \*\(14,\)\]"):
        model_for(model.config).loss(model.params, batch)
