"""The commands for speech: a tiny encoder without a head learns from a folder of recordings."""

import json
from pathlib import Path
import shutil

import captcha
import gin
from helpers import TINY_SPEECH, assert_same_tree, config, random_params
import numpy as np
import pytest

from coda_jax import checkpoints, cli, convert, runs
from coda_jax import params as params_lib
from coda_jax.best_rq import BestRQConfig
from coda_jax.routing import CodaConfig
from coda_jax.tasks import metrics

CONFIG = config(base=TINY_SPEECH, vocab_size=0, feature_dim=160, conv_width=5)
SIZES = ("emb_dim", "num_heads", "num_encoder_layers", "head_dim", "mlp_dim", "conv_width")
SIZES += ("max_left_distance", "max_right_distance")


@pytest.fixture(autouse=True)
def clean_gin():
    """Leaves no configuration behind."""
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """captcha's recordings of letters and digits, with what they say."""
    folder = tmp_path_factory.mktemp("recordings")
    clips = sorted((Path(captcha.__file__).parent / "data").glob("?/*.wav"))
    for split, chosen in (("train", clips[::3]), ("validation", clips[1::6])):
        rows = ["path\tsentence"]
        for clip in chosen:
            shutil.copy(clip, folder / f"{clip.parent.name}.wav")
            rows.append(f"{clip.parent.name}.wav\t{clip.parent.name}")
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny w2v-BERT without a head."""
    directory = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save_hf(directory, CONFIG, random_params(CONFIG))
    return directory


def arguments(checkpoint, folder):
    """What the commands share."""
    return [
        "--gin_file=tasks/audio_folder.gin",
        f"--gin.DIRECTORY='{folder}'",
        f"--gin.INITIAL_CHECKPOINT_PATH='{checkpoint}'",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 4}",
        "--gin.BATCH_SIZE=4",
    ]


def train(*flags):
    """Runs `coda train` with adapters of bottleneck 4."""
    assert cli.main(["train", *flags, "--gin.AdapterConfig.bottleneck=4"]) == 0
    gin.clear_config()


def finetune(directory, *flags):
    """Adapts with CoDA and a CTC head for bytes."""
    train(
        "--gin_file=runs/finetune.gin",
        "--gin_file=models/w2v_bert.gin",
        "--gin_file=methods/coda.gin",
        *flags,
        *(f"--gin.W2vBertConfig.{name}={getattr(CONFIG, name)!r}" for name in SIZES),
        f"--gin.MODEL_DIR='{directory}'",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder, checkpoint):
    """A run of `coda train` with CoDA."""
    directory = tmp_path_factory.mktemp("run")
    finetune(directory, *arguments(checkpoint, folder), "--gin.TRAIN_STEPS=24")
    return directory


def test_train_exports_an_adapter_with_the_new_head(trained, checkpoint):
    _, base = checkpoints.load_hf(checkpoint)
    cfg, params = checkpoints.load_adapter(trained / "export" / "adapter", base)
    assert (cfg.coda, cfg.vocab_size) == (CodaConfig(reduction=3), 384)
    assert "ctc_head" not in base and params["ctc_head"]["kernel"].shape == (16, 384)


def test_evaluate_and_predict_agree(trained, checkpoint, folder, tmp_path):
    """The error rates of `coda evaluate` are those of what `coda predict` writes."""
    shared = [f"--gin.INITIAL_ADAPTER_PATH='{trained}/export/adapter'", "--gin.BATCH_SIZE=4"]
    shared.append("--gin.Decoding.max_decode_length=4")
    cli.main(
        [
            "evaluate",
            "--gin_file=runs/evaluate.gin",
            *arguments(checkpoint, folder),
            *shared,
            f"--gin.OUTPUT='{tmp_path}/metrics.json'",
        ]
    )
    gin.clear_config()
    (found,) = json.loads((tmp_path / "metrics.json").read_text()).values()
    rows = [line.split("\t") for line in (folder / "validation.tsv").read_text().splitlines()[1:]]
    (tmp_path / "in.txt").write_text("\n".join(str(folder / path) for path, _ in rows) + "\n")
    cli.main(
        [
            "predict",
            "--gin_file=runs/predict.gin",
            *shared,
            f"--gin.INITIAL_CHECKPOINT_PATH='{checkpoint}'",
            "--gin.VOCABULARY='bytes'",
            f"--gin.INPUT='{tmp_path}/in.txt'",
            f"--gin.OUTPUT='{tmp_path}/out.jsonl'",
            "--gin.Decoding.max_input_length=64",
        ]
    )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    predictions = [line["prediction"].strip() for line in lines]
    assert metrics.transcript_errors([text for _, text in rows], predictions) == found


def test_a_head_is_created_only_where_there_is_none(checkpoint, tmp_path):
    config, _ = checkpoints.load_hf(checkpoint)
    found = runs.load_model(str(checkpoint), config=config.replace(vocab_size=20))
    assert found.params["ctc_head"]["kernel"].shape == (16, 20)
    checkpoints.save_hf(tmp_path, found.config, found.params)
    with pytest.raises(ValueError, match="vocab_size=30, not 20"):
        runs.load_model(str(tmp_path), config=config.replace(vocab_size=30))


def test_best_rq_pretrains_an_encoder_that_is_then_adapted_with_a_head(
    checkpoint, folder, tmp_path
):
    """From a checkpoint without a head to one without a head, and from there to CTC."""
    pretrained, adapted = tmp_path / "pretrained", tmp_path / "adapted"
    short = ["--gin.TRAIN_STEPS=3", "--gin.warmup_cosine_decay_schedule.warmup_steps=1"]
    best_rq = ["--gin.NUM_CODES=11", "--gin.BestRQConfig.start_probability=0.2"]
    train(
        "--gin_file=runs/pretrain_best_rq_coda.gin",
        *arguments(checkpoint, folder),
        *best_rq,
        f"--gin.MODEL_DIR='{pretrained}'",
        *short,
    )
    cfg, params = checkpoints.load_hf(pretrained / "export")
    _, before = checkpoints.load_hf(checkpoint)
    assert cfg.vocab_size == 0 and params.keys() == before.keys() == {"encoder"}
    before, after = params_lib.flatten(before), params_lib.flatten(params)
    assert all((leaf != after[path]).any() for path, leaf in before.items())
    cfg, params = checkpoints.load_adapter(pretrained / "export" / "adapter", params)
    assert (cfg.coda, params.keys()) == (CodaConfig(reduction=2), {"encoder"})
    convert.convert(str(pretrained), str(tmp_path / "same"), "adapter")
    assert_same_tree(checkpoints.load_adapter(tmp_path / "same", params)[1], params)

    adapter = f"--gin.INITIAL_ADAPTER_PATH='{pretrained}/export/adapter'"
    base = pretrained / "export"
    finetune(adapted, *arguments(base, folder), adapter, "--gin.REDUCTION=2", *short)
    cfg, found = checkpoints.load_adapter(
        adapted / "export" / "adapter", params_lib.split_new(params)[0]
    )
    assert cfg.vocab_size == 384 and found["ctc_head"]["kernel"].shape == (16, 384)
    for path, leaf in params_lib.flatten(params_lib.partition(params)[1]).items():
        np.testing.assert_array_equal(leaf, params_lib.flatten(found)[path])


def test_best_rq_refuses_a_z_loss(checkpoint):
    model = runs.load_model(str(checkpoint))
    with pytest.raises(ValueError, match=r"BEST-RQ has no z-loss: z_loss=0\.1"):
        runs.train(
            "unused",
            model,
            runs.Data({}, task="x"),
            None,
            None,
            0.0,
            z_loss=0.1,
            best_rq=BestRQConfig(),
        )
