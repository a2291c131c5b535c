"""The commands for speech: a tiny encoder without a head learns from a folder of recordings."""

import json
from pathlib import Path
import shutil

import captcha
import gin
from helpers import TINY_SPEECH, config, random_params
import pytest

from coda_jax import checkpoints, cli, runs
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder, checkpoint):
    """A run of `coda train` with CoDA."""
    directory = tmp_path_factory.mktemp("run")
    status = cli.main(
        [
            "train",
            "--gin_file=runs/finetune.gin",
            "--gin_file=models/w2v_bert.gin",
            "--gin_file=methods/coda.gin",
            *arguments(checkpoint, folder),
            *(f"--gin.W2vBertConfig.{name}={getattr(CONFIG, name)!r}" for name in SIZES),
            f"--gin.MODEL_DIR='{directory}'",
            "--gin.TRAIN_STEPS=24",
            "--gin.AdapterConfig.bottleneck=4",
        ]
    )
    gin.clear_config()
    assert status == 0
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
