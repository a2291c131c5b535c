"""A run of T5X: its config, what it starts from, and what it restores; without T5X."""

from helpers import (
    ADAPTER,
    GOLDEN,
    TINY,
    TINY_IMAGES,
    TINY_SPEECH,
    config,
    random_params,
    shapes,
)
import jax
import numpy as np
import pytest

from coda_jax import checkpoints, trees
from coda_jax.checkpoints.t5x_record import run_folder, write_record
from coda_jax.commands import t5x_run
from coda_jax.methods import Coda, Full, Lora, ParallelAdapter, StructuredPruning

CONFIG = config(coda={"reduction": 2.0, "max_segments": 2})


def table(cfg):
    """A table of leaves without shapes, as T5X shows that of orbax."""
    return trees.unflatten(dict.fromkeys(trees.flatten(shapes(cfg)["params"])))


@pytest.mark.parametrize("adaptation", [(Coda(), ParallelAdapter()), (Lora(),), (Full(),)])
@pytest.mark.parametrize("demanded", [True, False])
def test_what_is_restored_fits_wherever_it_lies(adaptation, demanded):
    """T5X starts what is not restored from scratch: the optimizer, and the methods' leaves."""
    cfg = config().replace(methods=adaptation)
    state = {"step": 7, "param_states": {"x": 1}}
    for stored, new_leaves in ((cfg.dense(), "created"), (cfg, "restored")):
        given = {"target": table(stored), "state": state}
        word = new_leaves if demanded else "found"
        found = t5x_run.restoration(cfg, "checkpoint", word)(given, None)
        assert found == {"target": table(stored), "state": {"step": 7}}
    assert t5x_run.restoration(cfg, "checkpoint")(given, None, is_resuming=True) is given
    with pytest.raises(ValueError, match=r"NEW_LEAVES must be one of .* got 'dropped'"):
        t5x_run.restoration(cfg, "checkpoint", "dropped")


ADAPTER_ALONE = CONFIG.replace(methods=(ParallelAdapter(),))


@pytest.mark.parametrize(
    ("stored", "asked", "new_leaves", "resuming", "text"),
    [
        (CONFIG, CONFIG, "created", False, "^checkpoint is an adapted checkpoint"),
        (CONFIG.dense(), CONFIG, "restored", False, "^checkpoint is a dense checkpoint"),
        (CONFIG, ADAPTER_ALONE, "found", True, r"^the checkpoint in MODEL_DIR was .* \['coda'\]"),
        (CONFIG.dense(), CONFIG, "found", True, "^the checkpoint in MODEL_DIR is a dense"),
        (
            config(num_encoder_layers=3),
            CONFIG,
            "found",
            False,
            r"(\n.*)*  extra: .*layers_2/mlp/wo",
        ),
    ],
)
def test_what_t5x_would_drop_or_start_anew_is_refused(stored, asked, new_leaves, resuming, text):
    given = {"target": table(stored), "state": {"step": 7}}
    with pytest.raises(ValueError, match=text):
        t5x_run.restoration(asked, "checkpoint", new_leaves)(given, None, is_resuming=resuming)


def test_how_a_run_starts_is_said_in_a_line(tmp_path, caplog):
    caplog.set_level("INFO")
    write_record(run_folder(tmp_path), CONFIG)
    for stored, said in (
        (CONFIG.dense(), "a dense checkpoint, and the leaves of coda, parallel_adapter start anew"),
        (
            CONFIG,
            "an adapted checkpoint (r = 2), and the leaves of coda, parallel_adapter are rest",
        ),
    ):
        given = {"target": table(stored), "state": {"step": 7}}
        t5x_run.restoration(CONFIG, str(tmp_path / "checkpoint_7"))(given, None)
        assert f"checkpoint_7 is {said}" in caplog.messages[-1]


def test_what_is_frozen_starts_from_a_checkpoint():
    cfg = config().replace(methods=(Coda(), ParallelAdapter()))
    with pytest.raises(ValueError, match=r"INITIAL_CHECKPOINT_PATH=None: .* would stay random"):
        t5x_run.restoration(cfg, None)
    assert t5x_run.restoration(cfg.replace(methods=(Full(),)), None)


def test_float16_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be 'float32' or 'bfloat16', got 'float16'"):
        t5x_run.adapted(config(), (Full(),), dtype="float16")


def test_a_run_needs_a_preset():
    with pytest.raises(ValueError, match="needs the sizes of its model: give a PRESET"):
        t5x_run.adapted(None, ())


def test_what_t5x_cannot_train_is_told_with_what_can():
    with pytest.raises(ValueError, match=r"num_decoder_layers=0; use `coda train`, or give a PRES"):
        t5x_run.adapted(TINY_SPEECH.replace(num_decoder_layers=0), (), unit="frames")
    with pytest.raises(ValueError, match=r"pad_id=1, decoder_start_id=0; train it with"):
        t5x_run.adapted(config(pad_id=1), ())


@pytest.mark.parametrize(
    ("base", "unit", "message"),
    [
        (TINY_IMAGES, "tokens", r"of patches, and .* of tokens: give --gin_file=t5x/images\.gin$"),
        (TINY_SPEECH, "tokens", r"of frames, and .* of tokens: give --gin_file=t5x/speech\.gin$"),
        (TINY_SPEECH, "patches", r"of frames, and .* patches: give --gin_file=t5x/speech\.gin$"),
        (TINY, "frames", r"of tokens, and the run of one of frames: leave out t5x/speech\.gin$"),
    ],
)
def test_other_inputs_than_those_of_the_preset_are_refused(base, unit, message):
    with pytest.raises(ValueError, match=message):
        t5x_run.adapted(base, (), unit=unit)


# --- What a run starts from. ---

ADAPTED = config().replace(methods=(Coda(2.0), ADAPTER))


def save(folder, cfg, step=10):
    params = jax.tree.map(np.asarray, random_params(cfg))
    return str(checkpoints.save_t5x(folder, params, step))


@pytest.fixture(name="dense")
def fixture_dense(tmp_path):
    """A dense checkpoint of step 10."""
    return save(tmp_path / "dense", ADAPTED.dense())


@pytest.fixture(name="run")
def fixture_run(tmp_path):
    """The folder of an adapted run at step 10."""
    save(tmp_path / "run", ADAPTED)
    write_record(run_folder(tmp_path / "run"), ADAPTED)
    return str(tmp_path / "run")


def test_a_training_starts_from_what_there_is(dense, run, tmp_path):
    given = {"model_dir": str(tmp_path / "new"), "total_steps": 20}
    for checkpoint in (dense, f"{run}/checkpoint_10", "gs://bucket/checkpoint_10"):
        made = t5x_run.network(ADAPTED, checkpoint, **given)
        assert type(made) is type(ADAPTED.network())
    with pytest.raises(ValueError, match=r"trained with other settings:\n  methods/coda/attention"):
        other = ADAPTED.replace(methods=(Coda(2.0, attention="k_to_all"), ADAPTER))
        t5x_run.network(other, f"{run}/checkpoint_10", **given)
    with pytest.raises(ValueError, match="is an adapted checkpoint"):
        t5x_run.network(ADAPTED, f"{run}/checkpoint_10", "created", **given)
    with pytest.raises(ValueError, match="is a dense checkpoint"):
        t5x_run.network(ADAPTED, dense, "restored")


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("relative", "dense/checkpoint_10", r"is relative, .*: give /.*/dense/checkpoint_10$"),
        (
            "not there",
            "{folder}/none",
            r"INITIAL_CHECKPOINT_PATH=/.*/none: there is no such folder",
        ),
        (
            "run",
            "{folder}/run",
            r"is the folder of a run, .*: give /.*/run/checkpoint_10, the newest",
        ),
        (
            "hf",
            str(GOLDEN / "v1_1"),
            r"is in Hugging Face's layout: `coda convert` with LAYOUT='t5x'",
        ),
    ],
)
def test_a_path_that_t5x_does_not_take_is_told(name, path, message, dense, run, tmp_path):
    path = path.format(folder=tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        t5x_run.network(ADAPTED, path, model_dir=str(tmp_path / "new"), total_steps=20)
    assert "\n" not in str(error.value)
    if name == "not there":
        with pytest.raises(FileNotFoundError, match=r"^CHECKPOINT_PATH=/"):
            t5x_run.network(ADAPTED, path)
    if name == "relative":
        with pytest.raises(ValueError, match=r"^MODEL_DIR=new is relative"):
            t5x_run.network(ADAPTED, dense, model_dir="new", total_steps=20)


def test_steps_are_counted_from_those_of_the_checkpoint(dense, tmp_path):
    """Whatever the folder of the checkpoint is called, and in a bucket by its name."""
    copied = tmp_path / "copied"
    (tmp_path / "dense" / "checkpoint_10").rename(copied)
    given = {"model_dir": str(tmp_path / "new")}
    for checkpoint in (str(copied), "gs://bucket/checkpoint_10"):
        t5x_run.network(ADAPTED, checkpoint, total_steps=11, **given)
        t5x_run.network(ADAPTED, checkpoint, total_steps=1, relative_steps=5, **given)
        for steps in (10, 3):
            message = f"TRAIN_STEPS={steps} counts the checkpoint's .* 10: for 1000 more give 1010"
            with pytest.raises(ValueError, match=message):
                t5x_run.network(ADAPTED, checkpoint, total_steps=steps, **given)
        pruned = ADAPTED.replace(methods=(StructuredPruning(rank=1, start=2, steps=0),))
        t5x_run.network(pruned, checkpoint, total_steps=12, **given)
        with pytest.raises(ValueError, match="until step 2, and the training ends after step 1"):
            t5x_run.network(pruned, checkpoint, total_steps=11, **given)


def test_a_run_goes_on_in_its_folder_though_the_checkpoint_before_is_gone(run):
    gone = "/nowhere/checkpoint_3"
    t5x_run.network(ADAPTED, gone, model_dir=run, total_steps=20)
    t5x_run.network(ADAPTED, gone, model_dir=run, total_steps=10)  # it is complete
    with pytest.raises(
        ValueError, match=r"TRAIN_STEPS=9, and the run in MODEL_DIR=.* has 10: give"
    ):
        t5x_run.network(ADAPTED, gone, model_dir=run, total_steps=9)
    full = ADAPTED.replace(methods=(Full(),))
    with pytest.raises(ValueError, match=r"other settings:\n  methods/coda: there"):
        t5x_run.network(full, gone, model_dir=run, total_steps=20)
    (run_folder(run) / "model.json").unlink()  # of a run of before
    with pytest.raises(ValueError, match=r"adapted with \['coda', 'parallel_adapter'\]"):
        t5x_run.network(full, gone, model_dir=run, total_steps=20)
