"""T5X checkpoints that hold only what was trained: the rest is that of a base.

The run's `model.json` has the fingerprints of the base's frozen leaves, as float32, in which T5X
trains them whatever their dtype is.
"""

from collections.abc import Collection, Mapping
import os
from typing import Any

import numpy as np

from coda_jax import trees
from coda_jax.checkpoints.fingerprints import leaf_sha256
from coda_jax.checkpoints.t5x_record import RECORD, read_base, run_folder
from coda_jax.methods import partition
from coda_jax.models import ModelConfig, param_shapes


def is_partial(config: ModelConfig, paths: Collection[str]) -> bool:
    """Whether a checkpoint of a model has none of the leaves that its methods leave frozen.

    Args:
        config: the model's.
        paths: of the checkpoint's leaves.
    """
    frozen = trees.flatten(partition(config, param_shapes(config))[1])
    return bool(frozen) and not any(path in paths for path in frozen)


def frozen_fingerprints(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, str]:
    """{path: SHA-256} of the leaves that a model's methods leave frozen, as float32."""
    frozen = trees.flatten(partition(config, params)[1])
    return {path: leaf_sha256(np.asarray(leaf, np.float32)) for path, leaf in frozen.items()}


def frozen_leaves(
    config: ModelConfig, checkpoint: str | os.PathLike, base: str, params: Mapping[str, Any]
) -> dict[str, Any]:
    """The leaves that a checkpoint lacks, from the base that its run was trained from.

    Args:
        config: the checkpoint's model.
        checkpoint: its folder, or that of its run.
        base: where the base was read, for errors.
        params: the base's leaves.

    Returns:
        The tree of the frozen ones, in the base's dtypes.

    Raises:
        ValueError: it is another base; or nobody knows which it was.
    """
    expected = read_base(run_folder(checkpoint))
    if expected is None:
        raise ValueError(
            f"{checkpoint} holds only what was trained, and the {RECORD} of its run, which says of "
            f"which base, is not in {run_folder(checkpoint)}: put it there"
        )
    found = frozen_fingerprints(config, params)
    paths = sorted(expected.keys() | found.keys())
    different = [path for path in paths if expected.get(path) != found.get(path)]
    if different:
        raise ValueError(
            f"{checkpoint} was not trained from {base}: {len(different)} of {len(paths)} frozen "
            f"leaves differ, such as {different[0]}. Give its base as INITIAL_CHECKPOINT_PATH"
        )
    return partition(config, params)[1]


def lacks_base(checkpoint: str | os.PathLike) -> ValueError:
    """The error for a checkpoint that needs its base, where none is given."""
    return ValueError(
        f"{checkpoint} holds only what was trained: give the base that it belongs to, with "
        "--gin.INITIAL_CHECKPOINT_PATH=..."
    )


def onto_base(
    config: ModelConfig,
    params: Mapping[str, Any],
    base: Mapping[str, Any],
    checkpoint: str | os.PathLike,
) -> dict[str, Any]:
    """The trained leaves of a checkpoint on the base, which the frozen ones must be.

    Args:
        config: the checkpoint's model.
        params: all of its leaves.
        base: the base's leaves.
        checkpoint: its folder, for errors.

    Returns:
        The whole tree, with the frozen leaves in the base's dtypes.

    Raises:
        ValueError: the frozen leaves have other values (all are listed).
    """
    saved, frozen = partition(config, params)
    _, base = partition(config, base)
    trees.check_tree(base, frozen, what=f"the frozen leaves of {checkpoint} do")
    theirs, ours = trees.flatten(base), trees.flatten(frozen)
    changed = [path for path, leaf in theirs.items() if not _same_values(leaf, ours[path])]
    if changed:
        raise ValueError(
            f"{checkpoint} was not trained from this base, these leaves differ:\n  "
            + "\n  ".join(changed)
        )
    return trees.merge(base, saved)


def _same_values(first: np.ndarray, second: np.ndarray) -> bool:
    # float64 holds every value of the dtypes that a base may have.
    return np.array_equal(first.astype(np.float64), second.astype(np.float64))
