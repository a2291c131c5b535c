"""A run of T5X: its config, and what it restores; without T5X."""

import functools
import inspect

from helpers import config, shapes
import pytest

from coda_jax import trees
from coda_jax.commands import t5x_run
from coda_jax.methods import Coda, Full, Lora, ParallelAdapter

CONFIG = config(coda={"reduction": 2.0, "max_segments": 2})


def table(cfg):
    """A table of leaves without shapes, as T5X shows that of orbax."""
    return trees.unflatten(dict.fromkeys(trees.flatten(shapes(cfg)["params"])))


@pytest.mark.parametrize("adaptation", [(Coda(), ParallelAdapter()), (Lora(),), (Full(),)])
def test_what_is_restored_fits_wherever_it_lies(adaptation):
    """T5X starts what is not restored from scratch: the optimizer, and the methods' leaves."""
    cfg = config().replace(methods=adaptation)
    state = {"step": 7, "param_states": {"x": 1}}
    for stored, new_leaves in ((cfg.dense(), "created"), (cfg, "restored")):
        given = {"target": table(stored), "state": state}
        found = t5x_run.restoration(cfg, "checkpoint", new_leaves)(given, None)
        assert found == {"target": table(stored), "state": {"step": 7}}
    assert t5x_run.restoration(cfg, "checkpoint")(given, None, is_resuming=True) is given
    with pytest.raises(ValueError, match=r"NEW_LEAVES must be one of .* got 'dropped'"):
        t5x_run.restoration(cfg, "checkpoint", "dropped")


@pytest.mark.parametrize(
    ("stored", "asked", "new_leaves", "resuming", "text"),
    [
        (CONFIG, CONFIG, "created", False, "extra: .*/router/kernel"),
        (CONFIG.dense(), CONFIG, "restored", False, "missing: .*/router/kernel"),
        (CONFIG, CONFIG.replace(methods=(ParallelAdapter(),)), "created", True, "extra: .*router"),
        (config(num_encoder_layers=3), CONFIG, "created", False, "extra: .*layers_2/mlp/wo"),
    ],
)
def test_what_t5x_would_drop_or_start_anew_is_refused(stored, asked, new_leaves, resuming, text):
    given = {"target": table(stored), "state": {"step": 7}}
    with pytest.raises(ValueError, match=rf"leaves\):(\n.*)*  {text}"):
        t5x_run.restoration(asked, "checkpoint", new_leaves)(given, None, is_resuming=resuming)


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


def test_the_best_are_kept_by_a_metric_with_its_folder():
    """T5X reads the defaults of a partial, and takes a class for any other checkpointer."""

    def checkpointer(*, metric_name_to_monitor="train/accuracy", metric_mode="max", keep=None):
        del metric_name_to_monitor, metric_mode, keep

    found = t5x_run.keeps_best(checkpointer, "training_eval/mnli/loss", "min")
    assert isinstance(found, functools.partial)
    given = {name: x.default for name, x in inspect.signature(found).parameters.items()}
    assert given == {
        "metric_name_to_monitor": "training_eval/mnli/loss",
        "metric_mode": "min",
        "keep": None,
    }
    with pytest.raises(ValueError, match=r"BEST_METRIC='loss' has no folder of events before"):
        t5x_run.keeps_best(checkpointer, "loss")
    with pytest.raises(ValueError, match=r"BEST_MODE must be one of \('max', 'min'\), got 'least'"):
        t5x_run.keeps_best(checkpointer, "train/loss", "least")
