"""Leaves that T5X does not find in a checkpoint as it restores them, and is given as arrays.

They are those that a run left out as it saved (SAVE_TRAINED_ONLY), which are its base's, and those
of T5X's scalable T5, whose layers are stacked. T5X's functions on a checkpoint's state, its
`state_transformation_fns`, can do both. Nothing here imports t5x.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coda_jax import checks, trees
from coda_jax.checkpoints.t5x import (
    is_of_scalable_t5,
    is_remote,
    is_t5x,
    read_t5x,
    t5x_shapes,
    table_of,
    with_leaves,
)
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
    if is_remote(base):
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


def whole(
    config: ModelConfig,
    checkpoint: str | Sequence[str] | None,
    base: str | None = None,
    model_dir: str | None = None,
) -> Callable:
    """Makes a checkpoint's table that of the whole model: a first `state_transformation_fns`.

    What is not stored as T5X restores it is then there as arrays: the leaves of a scalable T5, and
    those that a run left out as it saved.

    Args:
        config: the run's.
        checkpoint: where it starts from.
        base: the checkpoint that the run whose checkpoint it is started from.
        model_dir: the folder of a training, in which T5X goes on where it has checkpoints; None for
            evaluation and inference.

    Returns:
        (a checkpoint's state, the run's state) -> the checkpoint's state, whole.

    Raises:
        ValueError: a base is needed, and none is given.
    """
    goes_on = model_dir is not None and has_checkpoints(run_folder(model_dir))
    _check_base(config, model_dir if goes_on else checkpoint, base)

    def filled(state, wanted, is_resuming=False):
        target, place = state.get("target", {}), model_dir if is_resuming else checkpoint
        if not is_resuming and _is_local(place) and is_of_scalable_t5(place):
            target = read_t5x(place)[0]
        if is_partial(config, table_of(target)):
            target = with_leaves(target, _of_base(config, place, base, wanted["target"]))
        return {**state, "target": target}

    return filled


def _is_local(checkpoint: Any) -> bool:
    """Whether it is a T5X checkpoint, or such a run, on a local disk."""
    return isinstance(checkpoint, str) and not is_remote(checkpoint) and is_t5x(Path(checkpoint))


def _check_base(config: ModelConfig, checkpoint: Any, base: str | None) -> None:
    """Raises ValueError where a checkpoint on a local disk needs a base, and none is given."""
    if not _is_local(checkpoint) or not is_partial(config, trees.flatten(t5x_shapes(checkpoint))):
        return
    if base is None:
        raise lacks_base(checkpoint)
    if base == checkpoint:
        raise ValueError(
            f"{checkpoint} holds only what was trained: a training starts from all leaves, which "
            "`coda convert` with LAYOUT='t5x' and INITIAL_CHECKPOINT_PATH writes"
        )


def _of_base(
    config: ModelConfig, checkpoint: str, base: str | None, wanted: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """{path: array in the dtype that is wanted} of the leaves that a checkpoint lacks."""
    if base is None:
        raise lacks_base(checkpoint)
    frozen = trees.flatten(frozen_leaves(config, checkpoint, base, read_t5x(base)[0]))
    dtypes = {path: leaf.dtype for path, leaf in trees.flatten(wanted).items()}
    return {path: np.asarray(leaf, dtypes[path]) for path, leaf in frozen.items()}
