"""Runs of T5X that save only what they train (SAVE_TRAINED_ONLY): what T5X saves and restores then.

T5X's functions on a checkpoint's state, its `state_transformation_fns`, leave out the frozen leaves
as it saves, and give it those of the base as it restores. Nothing here imports t5x.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from coda_jax import checks, trees
from coda_jax.checkpoints.t5x import is_local_t5x, read_t5x, t5x_shapes, with_leaves
from coda_jax.checkpoints.t5x_partial import (
    frozen_fingerprints,
    frozen_leaves,
    is_partial,
    lacks_base,
)
from coda_jax.checkpoints.t5x_record import has_checkpoints, read_base, run_folder
from coda_jax.methods import partition, trained
from coda_jax.models import ModelConfig, param_shapes


def saved(config: ModelConfig, base: str, model_dir: str, trained_only: bool = False) -> Callable:
    """What T5X saves of its state: one of the `state_transformation_fns` of its saving.

    Args:
        config: the run's.
        base: the checkpoint that it started from.
        model_dir: the run's folder.
        trained_only: whether frozen leaves are left out.

    Returns:
        (the run's state, what T5X knows of each leaf) -> both, of what is saved.

    Raises:
        ValueError: nothing is frozen; the base is not on a local disk; or the run has saved all
            leaves so far.
    """
    if not checks.flag("SAVE_TRAINED_ONLY", trained_only):
        return lambda state, infos: (state, infos)
    if not partition(config, param_shapes(config))[1]:
        raise ValueError("SAVE_TRAINED_ONLY=True has no effect: METHODS train all parameters")
    if "://" in base:
        raise ValueError(
            f"SAVE_TRAINED_ONLY=True reads the base itself, from a local disk of each host: copy "
            f"INITIAL_CHECKPOINT_PATH={base} there, or leave SAVE_TRAINED_ONLY out"
        )
    folder = run_folder(model_dir)
    if has_checkpoints(folder) and read_base(folder) is None:
        raise ValueError(
            f"SAVE_TRAINED_ONLY=True is for a run from its start, and {model_dir} has checkpoints "
            "of all leaves: leave it out, or name another MODEL_DIR"
        )
    patterns = trained(config)

    def kept(tree):
        return {**tree, "target": trees.split(tree["target"], patterns)[0]}

    return lambda state, infos: (kept(state), kept(infos))


def noted_base(
    config: ModelConfig, base: str, model_dir: str, trained_only: bool = False
) -> dict[str, str] | None:
    """The fingerprints of the base for the run's record; None where all leaves are saved.

    Arguments are those of `saved`.
    """
    folder = run_folder(model_dir)
    if has_checkpoints(folder):
        return read_base(folder)
    return frozen_fingerprints(config, read_t5x(base)[0]) if trained_only else None


def completed(
    config: ModelConfig,
    target: Mapping[str, Any],
    wanted: Mapping[str, Any],
    checkpoint: str,
    base: str | None,
) -> dict[str, Any]:
    """What T5X restores of a checkpoint of what was trained, with the base's leaves as arrays.

    Args:
        config: the run's.
        target: the table of the checkpoint's parameters.
        wanted: the run's parameters, or their shapes and dtypes.
        checkpoint: its folder, or that of its run.
        base: the checkpoint that the run started from.

    Raises:
        ValueError: there is no base, or it is another one.
    """
    if base is None:
        raise lacks_base(checkpoint)
    frozen = trees.flatten(frozen_leaves(config, checkpoint, base, read_t5x(base)[0]))
    dtypes = {path: leaf.dtype for path, leaf in trees.flatten(wanted).items()}
    return with_leaves(target, {p: np.asarray(x, dtypes[p]) for p, x in frozen.items()})


def check_base(config: ModelConfig, checkpoint: Any, base: str | None) -> None:
    """Raises ValueError where a checkpoint on a local disk needs a base, and none is given."""
    if not isinstance(checkpoint, str) or not is_local_t5x(checkpoint):
        return
    if is_partial(config, trees.flatten(t5x_shapes(checkpoint))):
        if base is None:
            raise lacks_base(checkpoint)
        if base == checkpoint:
            raise ValueError(
                f"{checkpoint} holds only what was trained: a training starts from all leaves, "
                "which `coda convert` with LAYOUT='t5x' and INITIAL_CHECKPOINT_PATH writes"
            )
