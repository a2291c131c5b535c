"""A run of T5X: its model's config and network, and what it restores. Nothing here imports t5x.

The gin files of gin_configs/t5x name these functions.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import linen as nn

from coda_jax import checks
from coda_jax.checkpoints.t5x import table_of
from coda_jax.commands.check import NEW_LEAVES, compare_leaves
from coda_jax.commands.configuration import check_flags_of_t5x
from coda_jax.methods import Method, check_start
from coda_jax.models import ModelConfig, param_shapes


def adapted(
    config: ModelConfig,
    methods: Sequence[Method],
    dtype: Any = "float32",
    dropout_rate: float = 0.0,
) -> ModelConfig:
    """The config of a run: a preset with methods, dtype of the computation and dropout.

    Raises:
        ValueError: there is no config: a T5X checkpoint does not say its sizes; T5X cannot run it.
    """
    if config is None:
        raise ValueError("a run of T5X needs the sizes of its model: give a PRESET")
    if config.pad_id or config.decoder_start_id:
        raise ValueError(
            f"T5X pads with token 0 and starts decoders from it: pad_id={config.pad_id}, "
            f"decoder_start_id={config.decoder_start_id}; train it with `coda train`"
        )
    if not config.num_decoder_layers:
        raise ValueError("T5X trains encoder-decoders: num_decoder_layers=0; use `coda train`")
    return config.replace(methods=tuple(methods), dtype=dtype, dropout_rate=dropout_rate)


def network(config: ModelConfig) -> nn.Module:
    """The network of a config, as T5X's `module`.

    Raises:
        UsageError: of what was given on T5X's command line, something has no effect.
    """
    check_flags_of_t5x()
    return config.network()


def restoration(
    config: ModelConfig, checkpoint: str | None, new_leaves: str = "created"
) -> Callable:
    """What of a checkpoint T5X restores: one of its `state_transformation_fns`.

    These see the table of leaves of every checkpoint, wherever it lies. T5X itself would start
    parameters that are missing from scratch, and drop those that the model lacks. Of shapes orbax's
    table says nothing: Flax compares those, before the first step.

    Args:
        config: the run's.
        checkpoint: where it starts from.
        new_leaves: whether the methods' leaves are "created" or "restored", unless T5X goes on with
            its own run, whose leaves are all restored.

    Returns:
        (a checkpoint's state, the run's state) -> what is restored: the parameters, which are
        compared with the model's, and the step; the optimizer starts anew.

    Raises:
        ValueError: there is no checkpoint, so that what is frozen would stay random; `new_leaves`
            is another word.
    """
    checks.OneOf(NEW_LEAVES)("NEW_LEAVES", new_leaves)
    check_start(config, param_shapes(config), checkpoint)

    def restored(state, _, is_resuming=False):
        shapes = table_of(state.get("target", {}))
        compare_leaves(config, shapes, "the checkpoint", "restored" if is_resuming else new_leaves)
        if is_resuming:
            return state
        kept = {name: leaf for name, leaf in state["state"].items() if name != "param_states"}
        return {**state, "state": kept}

    return restored


def keeps_best(checkpointer: Callable, metric: str, mode: str = "max") -> Callable:
    """T5X's SaveBestCheckpointer in the one form in which T5X uses it with orbax, a partial.

    Given as the class, T5X takes it for any other one, and keeps the newest checkpoints.

    Args:
        checkpointer: T5X's class.
        metric: of a step, as TensorBoard shows it: the folder of events in the run's, and its name.
        mode: "max" where more of it is better, or "min".

    Raises:
        ValueError: `mode` is another word; `metric` has no folder.
    """
    checks.OneOf(("max", "min"))("BEST_MODE", mode)
    if "/" not in checks.text("BEST_METRIC", metric):
        raise ValueError(
            f"BEST_METRIC={metric!r} has no folder of events before its name, as "
            "'training_eval/TASK/loss' has"
        )
    return functools.partial(checkpointer, metric_name_to_monitor=metric, metric_mode=mode)
