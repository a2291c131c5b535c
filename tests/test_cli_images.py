"""The commands for images: train, evaluate, predict, cache, convert and export of a tiny model."""

import json

import gin
from helpers import ADAPTER, TINY_IMAGES, config, random_params
import jax
import numpy as np
from PIL import Image
import pytest
import seqio

from coda_jax import batches as batches_lib
from coda_jax import checkpoints, cli, data, runs
from coda_jax.convert import convert
from coda_jax.models import EncoderDecoder
from coda_jax.routing import CodaConfig
from coda_jax.tasks import images
from coda_jax.vision import Pix2StructConfig

TASK = "tiny_images"
LENGTHS = {"inputs": 12, "targets": 4}
CONFIG = config(base=TINY_IMAGES, vocab_size=384)


@pytest.fixture(autouse=True)
def clean_gin():
    """Leaves no configuration behind."""
    yield
    gin.clear_config()


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
        data.MemorySource(columns.__getitem__, tuple(columns)),
        images.load_images(),
        seqio.ByteVocabulary(extra_ids=data.BYTE_EXTRA_IDS),
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


def arguments(checkpoint):
    """What the commands share."""
    return [
        f"--gin.MIXTURE_OR_TASK_NAME='{TASK}'",
        f"--gin.INITIAL_CHECKPOINT_PATH='{checkpoint}'",
        f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}",
        "--gin.BATCH_SIZE=4",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, files, checkpoint):
    """A run of `coda train` with CoDA."""
    directory = tmp_path_factory.mktemp("run")
    status = cli.main(
        [
            "train",
            "--gin_file=runs/finetune.gin",
            "--gin_file=methods/coda.gin",
            *arguments(checkpoint),
            f"--gin.MODEL_DIR='{directory}'",
            "--gin.TRAIN_STEPS=30",
            "--gin.AdapterConfig.bottleneck=4",
        ]
    )
    gin.clear_config()
    assert status == 0
    return directory


def test_train_exports_an_adapter_of_its_family(trained, checkpoint):
    _, base = checkpoints.load_hf(checkpoint)
    cfg, _ = checkpoints.load_adapter(trained / "export" / "adapter", base)
    assert isinstance(cfg, Pix2StructConfig)
    assert (cfg.coda, cfg.adapter) == (CodaConfig(reduction=3), ADAPTER)
    assert json.loads((trained / "run.json").read_text())["model"]["family"] == "pix2struct"


def test_evaluate_agrees_with_the_evaluation_during_training(trained, checkpoint, tmp_path):
    output = tmp_path / "metrics.json"
    cli.main(
        [
            "evaluate",
            "--gin_file=runs/evaluate.gin",
            *arguments(checkpoint),
            f"--gin.INITIAL_ADAPTER_PATH='{trained}/export/adapter'",
            f"--gin.OUTPUT='{output}'",
            "--gin.Decoding.max_decode_length=4",
        ]
    )
    (metrics,) = json.loads(output.read_text()).values()
    during = json.loads((trained / "metrics.json").read_text())
    assert metrics["accuracy"] == pytest.approx(100 * during["exact_match"], abs=1e-4)


def test_predict_answers_what_the_task_gives(trained, checkpoint, files, tmp_path):
    """The files of the validation split: patches and answers are those of the task."""
    paths = files["validation"]["image"]
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(paths) + "\n")
    cli.main(
        [
            "predict",
            "--gin_file=runs/predict.gin",
            f"--gin.INITIAL_CHECKPOINT_PATH='{checkpoint}'",
            f"--gin.INITIAL_ADAPTER_PATH='{trained}/export/adapter'",
            "--gin.VOCABULARY='bytes'",
            f"--gin.INPUT='{source}'",
            f"--gin.OUTPUT='{output}'",
            "--gin.Decoding.max_input_length=12",
            "--gin.Decoding.max_decode_length=4",
            "--gin.BATCH_SIZE=4",
        ]
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["image"] for line in lines] == paths
    _, base = checkpoints.load_hf(checkpoint)
    cfg, params = checkpoints.load_adapter(trained / "export" / "adapter", base)
    asked = runs.Data(LENGTHS, task=TASK, split="validation", batch_size=6, shuffle=False)
    (batch,) = asked.batches(cfg, repeat=False)
    model, vocabulary = EncoderDecoder(cfg), data.load_vocabulary("bytes")
    predict = jax.jit(lambda inputs: model.predict(params, inputs, max_decode_length=4))
    found = np.asarray(predict(batch["encoder_input_tokens"]))
    answers = [vocabulary.decode(row.tolist()) for row in found]
    assert [line["prediction"] for line in lines] == answers


def test_a_cache_gives_the_batches_of_the_task(checkpoint, files, tmp_path):
    path = str(tmp_path / "train.npz")
    cli.main(
        ["cache", "--gin_file=runs/cache.gin", *arguments(checkpoint), f"--gin.OUTPUT='{path}'"]
    )
    examples, metadata = batches_lib.read_cache(path)
    assert len(examples) == 12 and metadata["vocabulary"] == "bytes"
    model = runs.load_model(str(checkpoint), adapter=ADAPTER)
    sources = ({"task": TASK}, {"cache": path})
    cached, direct = (
        list(runs.Data(LENGTHS, batch_size=5, shuffle=False, **source).batches(model.config, False))
        for source in sources
    )
    assert len(cached) == len(direct) == 3
    for first, second in zip(cached, direct, strict=True):
        assert first["encoder_input_tokens"].dtype == np.float32
        for key, values in second.items():
            np.testing.assert_array_equal(first[key], values, err_msg=key)


def test_batches_equal_those_of_seqio(files):
    ours = batches_lib.batch_examples(
        data.seqio_examples(
            TASK, "train", feature_lengths=LENGTHS, seed=0, shuffle=False, num_epochs=1
        ),
        batch_size=4,
        feature_lengths=LENGTHS,
    )
    task = seqio.get_mixture_or_task(TASK)
    dataset = task.get_dataset(LENGTHS, "train", shuffle=False)
    theirs = data.feature_converter(TASK)(dataset, LENGTHS).batch(4).as_numpy_iterator()
    for first, second in zip(ours, theirs, strict=True):
        assert first.keys() == second.keys()
        for key, values in second.items():
            assert first[key].dtype == values.dtype
            np.testing.assert_array_equal(first[key], values, err_msg=key)


def test_a_run_is_converted(trained, checkpoint, tmp_path):
    convert(trained, tmp_path / "adapter", "adapter", base=str(checkpoint))
    for name in ("adapter.safetensors", "adapter.json"):
        exported = (trained / "export" / "adapter" / name).read_bytes()
        assert (tmp_path / "adapter" / name).read_bytes() == exported


def test_texts_are_not_for_a_model_of_images(checkpoint, tmp_path):
    batches_lib.write_cache(
        tmp_path / "text.npz", [{"inputs": np.array([5, 1]), "targets": np.array([5, 1])}] * 4,
        {"vocabulary": "bytes", "vocab_size": 384},
    )  # fmt: skip
    text = runs.Data(LENGTHS, cache=str(tmp_path / "text.npz"), batch_size=4)
    model = runs.load_model(str(checkpoint), adapter=ADAPTER)
    batch = next(iter(text.batches(model.config, repeat=True)))
    with pytest.raises(ValueError, match=r"pix2struct takes inputs \[B, N, \*\(14,\)\]"):
        EncoderDecoder(model.config).loss(model.params, batch)
