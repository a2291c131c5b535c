"""Is a run of T5X the one that its folder holds? What was trained is compared with what is asked.

A T5X checkpoint does not say how its model is adapted. The run's `model.json` does, see
`checkpoints.t5x_record`; the folder of a run of before has T5X's own `config.gin`, whose recipe is
read. What differs changes no leaf, so that nobody else would notice.
"""

from collections.abc import Mapping, Sequence
import os
from pathlib import Path
from typing import Any

from absl import logging

from coda_jax import methods
from coda_jax.checkpoints.config_json import from_json, to_json
from coda_jax.checkpoints.t5x_record import (
    RECORD,
    has_checkpoints,
    read_record,
    run_folder,
    write_record,
)
from coda_jax.commands.gin_files import Binding, Macro, bindings_of
from coda_jax.models import FAMILIES, ModelConfig
from coda_jax.training.run_identity import differences

_CONFIG_GIN = "config.gin"  # T5X writes it into the folder of a run
_COMPUTE = ("dtype", "dropout_rate")  # fields in which two runs of a model may differ


def check_resumed(model_dir: str | os.PathLike, config: ModelConfig) -> None:
    """Checks that a run that goes on in its folder is the one that began there.

    Args:
        model_dir: the run's folder, which has checkpoints.
        config: of the model that is to be trained on.

    Raises:
        ValueError: it is another one; each value that differs is named, there and here.
    """
    saved = recorded(model_dir, config)
    if saved is None:
        logging.warning("%s: it is not known how its checkpoints were trained", model_dir)
    elif lines := _differing(methods.with_room_of(saved.methods, config.methods), saved, config):
        raise ValueError(
            f"{model_dir} holds a run with other settings:\n  "
            + "\n  ".join(lines)
            + "\nGive these again, or name another MODEL_DIR: with "
            "INITIAL_CHECKPOINT_PATH it goes on from a checkpoint of this one"
        )


def check_restored(
    checkpoint: str | os.PathLike, config: ModelConfig, goes_on: str, change: bool = False
) -> None:
    """Checks that a checkpoint was trained with the methods with which it is used now.

    Another reduction is logged; so are other methods, where they are asked for.

    Args:
        checkpoint: its folder, or that of its run.
        config: of the model that takes its parameters.
        goes_on: what it is used for, such as "evaluated".
        change: whether other methods are asked for.

    Raises:
        ValueError: the methods, or sizes that no shape tells, are others.
    """
    saved = recorded(checkpoint, config)
    if saved is None:
        logging.warning("%s: it is not known how it was trained", checkpoint)
        return
    there, here = map(methods.acting, (saved.methods, config.methods))
    before, now = map(methods.reduction_of, (there, here))
    if lines := _differing(methods.with_tuning_of(there, here), saved, config, here):
        text = "\n  ".join(lines)
        if not change:
            raise ValueError(
                f"{checkpoint} was trained with other settings:\n  {text}\n"
                f"Give these values again; CHANGE_METHODS=True has it {goes_on} with the new ones"
            )
        logging.warning("%s is %s with other settings:\n  %s", checkpoint, goes_on, text)
    elif before != now:
        logging.warning("%s: trained at r = %s, %s at r = %s", checkpoint, before, goes_on, now)


def recorded(checkpoint: str | os.PathLike, given: ModelConfig) -> ModelConfig | None:
    """The config with which a checkpoint's run was trained; None where its folder does not say it.

    Args:
        checkpoint: its folder, or that of its run.
        given: a config of the same sizes, which config.gin alone does not tell.

    Raises:
        ValueError: what the folder says cannot be understood; the file is named.
    """
    folder = run_folder(checkpoint)
    if (saved := read_record(folder)) is not None:
        return saved
    file = folder / _CONFIG_GIN
    if not file.exists():
        return None
    entries = _entries(bindings_of(file.read_text(encoding="utf-8"), str(file)))
    return None if entries is None else from_json({**to_json(given), "methods": entries}, file)


def config_of(
    checkpoint: Path,
    params: Mapping[str, Any],
    given: ModelConfig | None,
    adaptation: Sequence[methods.Method],
) -> ModelConfig:
    """The config of a checkpoint's model: what its run's folder says, is given, or shapes tell.

    Args:
        checkpoint: its folder, or that of its run.
        params: its parameters.
        given: sizes, or None.
        adaptation: methods that are given, or ().

    Raises:
        ValueError: what is given is not what the folder says; or nobody knows the sizes.
    """
    config = given or read_record(run_folder(checkpoint)) or infer_config(params, checkpoint)
    saved = recorded(checkpoint, config)
    config = config.replace(methods=tuple(adaptation) or (saved or config).methods)
    if saved is not None:
        _check_same(checkpoint, saved, config)
    return config.replace(dtype="float32")


def infer_config(params: Mapping[str, Any], source: object) -> ModelConfig:
    """The config that the shapes of a T5X checkpoint tell.

    Raises:
        ValueError: they tell none; each family says why.
    """
    problems = []
    for family in FAMILIES.values():
        if family.infer_config is None:
            continue
        try:
            config = family.infer_config(params)
        except ValueError as error:
            problems.append(str(error))
        else:
            print(f"config, from the shapes of {source}: {config}")
            return config
    raise ValueError(f"{source} does not tell its config: {'; '.join(problems)}")


def write_beside(folder: Path, config: ModelConfig) -> None:
    """Says in a folder of T5X checkpoints what the model of a further one is.

    Raises:
        ValueError: the folder holds a run of another model.
    """
    if not has_checkpoints(run_folder(folder)):
        write_record(run_folder(folder), config)
    elif (saved := recorded(folder, config)) is not None:
        _check_same(folder, saved, config)


def _check_same(folder: Path, saved: ModelConfig, given: ModelConfig) -> None:
    """Raises ValueError where a config is not the one with which a folder's run was trained."""
    if lines := _differing(methods.with_room_of(saved.methods, given.methods), saved, given):
        raise ValueError(
            f"{folder} was trained with other settings, see {RECORD} or {_CONFIG_GIN} in it:\n  "
            + "\n  ".join(lines)
        )


def _differing(
    there: Sequence[methods.Method],
    saved: ModelConfig,
    config: ModelConfig,
    here: Sequence[methods.Method] | None = None,
) -> list[str]:
    """A line for each value of a saved config with these methods that is another one here."""
    compute = {name: getattr(config, name) for name in _COMPUTE}
    here = config.methods if here is None else here
    saved = saved.replace(methods=tuple(there), **compute)
    return differences(to_json(saved), to_json(config.replace(methods=tuple(here))))


def _entries(bindings: Sequence[Binding]) -> list[dict[str, Any]] | None:
    """The methods of a training's gin configuration, as JSON has them; None where it has none."""
    macros = {binding.macro: binding.value for binding in bindings if binding.macro}

    def value_of(value):
        while isinstance(value, Macro):
            value = macros.get(value.name)
        return value

    if "TRAIN_STEPS" not in macros or "METHODS" not in macros:
        return None
    return [
        {"name": name}
        | {
            binding.parameter: value_of(binding.value)
            for binding in bindings
            if binding.parameter and binding.selector.split(".")[-1] == methods.find(name).__name__
        }
        for name in value_of(macros["METHODS"])
    ]
