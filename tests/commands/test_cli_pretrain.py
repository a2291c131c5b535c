"""Conditional pretraining on data of one's own: three steps, and a base that can be loaded."""

from pathlib import Path
import shutil
import sysconfig

import captcha
from command_line import coda
from helpers import ADAPTER, TINY_IMAGES, TINY_SPEECH, config, random_params
import numpy as np
import pytest

from coda_jax import bundled, checkpoints, cli, trees
from coda_jax.methods import Coda

SHORT = {"TRAIN_STEPS": 3, "BATCH_SIZE": 4, "ParallelAdapter.bottleneck": ADAPTER.bottleneck}
STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module", name="texts")
def fixture_texts(tmp_path_factory):
    """Real texts, in folders."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "inner").mkdir()
    for path in sorted(STDLIB.glob("[a-c]*.py")):
        shutil.copy(path, folder / "inner" / path.name)
    return folder


def pretrained(tmp_path, cfg, files, given, reduction):
    """Trains a random model; (its parameters before, those of the base that is exported)."""
    before = random_params(cfg)
    checkpoints.save_hf(tmp_path / "dense", cfg, before)
    given = {"MODEL_DIR": tmp_path / "run", "INITIAL_CHECKPOINT_PATH": tmp_path / "dense", **given}
    coda("train", files, SHORT | given)
    found, params = checkpoints.load_hf(tmp_path / "run" / "export")
    adapted, _ = checkpoints.load_adapter(tmp_path / "run" / "export" / "adapter", found, params)
    assert any(isinstance(x, Coda) and x.reduction == reduction for x in adapted.methods)
    return trees.flatten(before), trees.flatten(params)


def all_changed(before, after):
    return all((np.asarray(leaf) != np.asarray(after[path])).any() for path, leaf in before.items())


@pytest.mark.parametrize(
    "denoisers", ["span_corruption", pytest.param("ul2", marks=pytest.mark.all)]
)
def test_texts_with_a_vocabulary_beside_the_checkpoint(denoisers, texts, tmp_path):
    (tmp_path / "dense").mkdir()
    shutil.copy(bundled.VOCABULARY / "spiece.model", tmp_path / "dense")
    given = {"TEXTS": texts, "DENOISERS": denoisers, "DTYPE": "float32"}
    given |= {"TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 64}}
    cfg = config(vocab_size=4096, num_encoder_layers=1)
    before, after = pretrained(tmp_path, cfg, ["runs/pretrain_text_coda.gin"], given, 3)
    assert all_changed(before, after)
    assert (tmp_path / "run" / "export" / "spiece.model").exists()


@pytest.mark.all
def test_printed_texts(texts, tmp_path):
    cfg = config(base=TINY_IMAGES, vocab_size=384, num_positions=64)
    given = {"TEXTS": texts, "VOCABULARY": "bytes", "REDUCTION": 4}
    given["pretrain_rendered.task.patch_size"] = cfg.patch_size
    given |= {"TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16}}
    files = ["runs/pretrain_coda.gin", "tasks/pretrain_rendered.gin"]
    before, after = pretrained(tmp_path, cfg, files, given, 4)
    assert all_changed(before, after)


@pytest.mark.all
def test_recordings_without_transcripts(tmp_path):
    for clip in sorted((Path(captcha.__file__).parent / "data").glob("?/*.wav")):
        (tmp_path / "clips" / clip.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / "clips" / clip.parent.name)
    changes = {"vocab_size": 0, "feature_dim": 160, "conv_width": 5, "num_encoder_layers": 1}
    given = {"RECORDINGS": tmp_path / "clips", "NUM_CODES": 11}
    given |= {"TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 1}}
    given["BestRQConfig.start_probability"] = 0.2
    files = ["runs/pretrain_best_rq_coda.gin", "tasks/audio_files.gin"]
    cfg = config(base=TINY_SPEECH, **changes)
    before, after = pretrained(tmp_path, cfg, files, given, 2)
    assert all_changed(before, after)


def test_a_file_that_is_no_text_ends_a_run_with_a_line(texts, tmp_path, capsys):
    cfg = config(vocab_size=384, num_encoder_layers=1)
    checkpoints.save_hf(tmp_path / "dense", cfg, random_params(cfg))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.bin").write_bytes(b"\xff\xfe\n" * 100)
    given = {"MODEL_DIR": tmp_path / "run", "INITIAL_CHECKPOINT_PATH": tmp_path / "dense"}
    given |= {"TEXTS": tmp_path / "texts", "VOCABULARY": "bytes"}
    flags = [f"--gin.{name}={value}" for name, value in (SHORT | given).items()]
    assert cli.main(["train", "--gin_file=runs/pretrain_text_coda.gin", *flags]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("coda train: ")]
    assert "a.bin:1: not UTF-8" in line
