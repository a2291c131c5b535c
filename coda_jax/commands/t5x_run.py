"""A run of T5X: its model, and what it starts from, checked before T5X builds anything.

The gin files of gin_configs/t5x name these functions. Nothing here imports t5x.
"""

from collections.abc import Callable, Sequence
import os
from pathlib import Path
import re
from typing import Any

from absl import logging
from flax import linen as nn

from coda_jax import checks, files
from coda_jax.checkpoints.huggingface import CONFIG_FILE
from coda_jax.checkpoints.t5x import PREFIX, find_t5x, is_remote, t5x_step, table_of
from coda_jax.checkpoints.t5x_record import has_checkpoints, run_folder
from coda_jax.commands.check import NEW_LEAVES, check_leaves, compare_leaves, start
from coda_jax.commands.configuration import check_flags_of_t5x
from coda_jax.commands.t5x_identity import check_restored, check_resumed, recorded
from coda_jax.methods import Method, check_start, check_steps, reduction_of
from coda_jax.models import FAMILIES, ModelConfig, param_shapes
from coda_jax.optional import needs

_INPUT_FILES = {"patches": "t5x/images.gin", "frames": "t5x/speech.gin"}  # texts have none


def adapted(
    config: ModelConfig,
    methods: Sequence[Method],
    dtype: Any = "float32",
    dropout_rate: float = 0.0,
    remat_policy: str = "none",
    unit: str = "tokens",
) -> ModelConfig:
    """The config of a run: a preset with methods, dtype of the computation, dropout and remat.

    Args:
        config: the preset.
        methods: how it is adapted.
        dtype: of the computation.
        dropout_rate: in training.
        remat_policy: what a layer computes again for its gradient, see `nn.remat`.
        unit: what the run's inputs are made of, see `models.Inputs`.

    Raises:
        ValueError: there is no config: a T5X checkpoint does not say its sizes; it has other
            inputs; T5X cannot run it.
    """
    if config is None:
        raise ValueError("a run of T5X needs the sizes of its model: give a PRESET")
    if (own := FAMILIES[config.family].inputs.unit) != unit:
        file = _INPUT_FILES.get(own)
        remedy = f"give --gin_file={file}" if file else f"leave out {_INPUT_FILES.get(unit)}"
        raise ValueError(f"PRESET is of a model of {own}, and the run of one of {unit}: {remedy}")
    if config.pad_id or config.decoder_start_id:
        raise ValueError(
            f"T5X pads with token 0 and starts decoders from it: pad_id={config.pad_id}, "
            f"decoder_start_id={config.decoder_start_id}; train it with `coda train`"
        )
    if not config.num_decoder_layers:
        raise ValueError(
            "T5X trains encoder-decoders: num_decoder_layers=0; use `coda train`, or give a PRESET "
            "of speech NUM_DECODER_LAYERS"
        )
    run = {"dtype": dtype, "dropout_rate": dropout_rate, "remat_policy": remat_policy}
    return config.replace(methods=tuple(methods), **run)


def network(
    config: ModelConfig,
    checkpoint: str | Sequence[str] | None = None,
    new_leaves: str = "found",
    change_methods: bool = False,
    model_dir: str | None = None,
    total_steps: int | None = None,
    relative_steps: int | None = None,
) -> nn.Module:
    """The network of a run, T5X's `module`, which T5X makes first of all; the run is checked here.

    Args:
        config: the run's.
        checkpoint: where the run starts from; several where T5X evaluates them in turn. Those on
            a local disk are compared here, others as they are restored.
        new_leaves: whether the methods' leaves are "created" or "restored", or as they are "found".
        change_methods: whether the checkpoint is used with other methods than its run's.
        model_dir: the folder of a training, in which T5X goes on where it has checkpoints; None for
            evaluation and inference.
        total_steps: at which a training ends.
        relative_steps: T5X's, which count from the checkpoint, and then alone.

    Raises:
        UsageError: of what was given on T5X's command line, something has no effect.
        FileNotFoundError: there is no such checkpoint.
        ValueError: T5X would refuse it, or misread it: a path, the leaves (all are listed), the
            steps; or a run was another one.
    """
    check_flags_of_t5x()
    checks.OneOf(NEW_LEAVES)("NEW_LEAVES", new_leaves)
    checks.flag("CHANGE_METHODS", change_methods)
    trains = model_dir is not None
    if trains:
        _check_absolute("MODEL_DIR", model_dir)
        if not is_remote(model_dir):
            files.check_stores("MODEL_DIR", model_dir)
    last = checks.COUNT("TRAIN_STEPS", total_steps) if trains and not relative_steps else None
    if trains and has_checkpoints(run_folder(model_dir)):
        _check_resumed(config, model_dir, last)
        return config.network()
    done = 0
    for path in [checkpoint] if isinstance(checkpoint, str) else checkpoint or ():
        _check_place("INITIAL_CHECKPOINT_PATH" if trains else "CHECKPOINT_PATH", path)
        found = new_leaves if is_remote(path) else check_leaves(config, path, new_leaves)
        if found == "restored":
            check_restored(path, config, "trained on" if trains else "evaluated", change_methods)
        done = _check_start_step(path, last)
    if last is not None:
        check_steps(config.methods, last - done)
    return config.network()


def restoration(
    config: ModelConfig,
    checkpoint: str | None,
    new_leaves: str = "found",
    change_methods: bool = False,
) -> Callable:
    """What of a checkpoint T5X restores: one of its `state_transformation_fns`.

    These see the table of leaves of every checkpoint, wherever it lies. T5X itself would start
    parameters that are missing from scratch, and drop those that the model lacks. Of shapes orbax's
    table says nothing: Flax compares those, before the first step.

    Args:
        config: the run's.
        checkpoint: where it starts from.
        new_leaves: see `network`; where T5X goes on with its own run, all leaves are restored.
        change_methods: see `network`.

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
        if is_resuming:
            compare_leaves(config, shapes, "the checkpoint in MODEL_DIR", "restored")
            return state
        found = compare_leaves(config, shapes, checkpoint, new_leaves)
        saved = None
        if found == "restored":
            if new_leaves == "found" and is_remote(checkpoint):  # `network` could not know it
                check_restored(checkpoint, config, "trained on", change_methods)
            saved = recorded(checkpoint, config)
        said = start(config, found, saved and reduction_of(saved.methods))
        logging.info("%s is %s", checkpoint, said)
        kept = {name: leaf for name, leaf in state["state"].items() if name != "param_states"}
        return {**state, "state": kept}

    return restored


def _check_resumed(config: ModelConfig, model_dir: str, total_steps: int | None) -> None:
    """Checks that T5X can go on in a run's folder.

    A run that is complete is none of its mistakes: it is started again where machines are.
    """
    check_resumed(model_dir, config)
    if is_remote(model_dir):
        return
    newest = find_t5x(model_dir)
    check_leaves(config, str(newest), "restored")
    step = t5x_step(newest)
    if total_steps is not None and total_steps < step:
        raise ValueError(
            f"TRAIN_STEPS={total_steps}, and the run in MODEL_DIR={model_dir} has {step}: give "
            "more, or another MODEL_DIR"
        )


def _check_absolute(name: str, path: str) -> None:
    if not is_remote(path) and not os.path.isabs(path):
        raise ValueError(
            f"{name}={path} is relative, and T5X takes absolute paths: give {os.path.abspath(path)}"
        )


def _check_place(name: str, path: str) -> None:
    """Raises where a path is not that of a checkpoint that T5X reads; only local ones are known."""
    _check_absolute(name, path)
    if is_remote(path):
        return
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name}={path}: there is no such folder")
    if os.path.isfile(os.path.join(path, CONFIG_FILE)):
        raise ValueError(
            f"{name}={path} is in Hugging Face's layout: `coda convert` with LAYOUT='t5x' makes it "
            "T5X's"
        )
    if (newest := find_t5x(path)) != Path(path) and _restore_mode() == "specific":
        raise ValueError(
            f"{name}={path} is the folder of a run, and T5X takes one checkpoint: give {newest}, "
            "the newest in it"
        )


def _restore_mode() -> Any:
    """T5X's, as gin has it: one checkpoint is "specific", others take a folder of them."""
    with needs():
        import gin

    try:
        mode = gin.query_parameter("RestoreCheckpointConfig.mode")
    except ValueError:  # gin configures nothing
        return "specific"
    return mode.scoped_configurable_fn() if hasattr(mode, "scoped_configurable_fn") else mode


def _check_start_step(path: str, total_steps: int | None) -> int:
    """The step of the checkpoint that a training starts from; ValueError where it ends before."""
    if total_steps is None:
        return 0
    if is_remote(path):
        named = re.search(rf"/{PREFIX}_(\d+)/?$", path)
        step = int(named[1]) if named else 0
    else:
        step = t5x_step(path)
    if total_steps <= step:
        raise ValueError(
            f"TRAIN_STEPS={total_steps} counts the checkpoint's steps, too, which are {step}: "
            f"for 1000 more give {step + 1000}"
        )
    return step
