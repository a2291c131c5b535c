"""Which checkpoints T5X keeps; without T5X."""

import functools
import inspect

import pytest

from coda_jax.commands import t5x_best


def test_the_best_are_kept_by_a_metric_with_its_folder():
    """T5X reads the defaults of a partial, and takes a class for any other checkpointer."""

    def checkpointer(*, metric_name_to_monitor="train/accuracy", metric_mode="max", keep=None):
        del metric_name_to_monitor, metric_mode, keep

    found = t5x_best.keeps_best(checkpointer, "training_eval/mnli/loss", "min")
    assert isinstance(found, functools.partial)
    given = {name: x.default for name, x in inspect.signature(found).parameters.items()}
    assert given == {
        "metric_name_to_monitor": "training_eval/mnli/loss",
        "metric_mode": "min",
        "keep": None,
    }
    with pytest.raises(ValueError, match=r"BEST_METRIC='loss' has no folder of events before"):
        t5x_best.keeps_best(checkpointer, "loss")
    with pytest.raises(ValueError, match=r"BEST_MODE must be one of \('max', 'min'\), got 'least'"):
        t5x_best.keeps_best(checkpointer, "train/loss", "least")
