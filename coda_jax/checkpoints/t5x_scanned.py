"""From the parameter tree of T5X's scalable T5 to that of its T5, which is ours.

The scalable T5 keeps each kind of parameter of a stack in one array with an axis over the layers
(`encoder/encoder/mlp/wo/kernel` in place of `encoder/layers_N/mlp/wo/kernel`), attention kernels
with the heads as an axis of their own, and a relative position bias in every layer.
"""

from collections.abc import Mapping
import re

import numpy as np

STACKS = ("encoder", "decoder")
NORM = r"pre_\w+_layer_norm/scale"
HEADS = r"attention/(query|key|value)/kernel$"  # [D, H, head_dim]
OUT = r"attention/out/kernel$"  # [H, head_dim, D]
BIAS = "relpos_bias/rel_embedding"


def is_stacked(path: str) -> bool:
    """Whether a leaf is of all layers of a stack, as a scalable T5 has them."""
    return path.startswith(tuple(f"{stack}/{stack}/" for stack in STACKS))


def to_layers(flat: Mapping[str, np.ndarray], source: object) -> dict[str, np.ndarray]:
    """Renames and reshapes the leaves of a scalable T5; those of a T5 are returned as they are.

    Args:
        flat: {path: array}.
        source: the checkpoint, for errors.

    Raises:
        ValueError: if the arrays of a stack do not agree in the number of layers; if the layers of
            a stack do not share their relative position bias, as in umT5.
    """
    flat = dict(flat)
    for stack in STACKS:
        _unstack(flat, stack, source)
    for path, leaf in flat.items():
        if leaf.ndim == 3 and re.search(HEADS, path):
            flat[path] = leaf.reshape(leaf.shape[0], -1)
        elif leaf.ndim == 3 and re.search(OUT, path):
            flat[path] = leaf.reshape(-1, leaf.shape[2])
    for stack in STACKS:
        _share_bias(flat, stack, source)
    return dict(sorted(flat.items()))


def _unstack(flat: dict[str, np.ndarray], stack: str, source: object) -> None:
    """Replaces the stacked leaves of a stack by those of its layers."""
    prefix = f"{stack}/{stack}/"
    stacked = {path: flat.pop(path) for path in list(flat) if path.startswith(prefix)}
    if not stacked:
        return
    norms = [leaf for path, leaf in stacked.items() if re.fullmatch(prefix + NORM, path)]
    reference = flat.get(f"{stack}/{stack}_norm/scale")
    if reference is None or not norms or norms[0].ndim != 2:
        raise ValueError(
            f"{source} has stacked layers in {prefix}, but not the norms that say how: "
            f"{stack}/{stack}_norm/scale and {prefix}pre_..._layer_norm/scale."
        )
    # T5X's default is axis 1: [D, layers]. Where the sizes do not decide, it is taken.
    axis = 1 if norms[0].shape[0] == reference.shape[0] else 0
    num_layers = norms[0].shape[axis]
    wrong = [f"{path} {leaf.shape}" for path, leaf in stacked.items()
             if leaf.ndim < 2 or leaf.shape[axis] != num_layers]  # fmt: skip
    if wrong:
        raise ValueError(
            f"{source}: axis {axis} should be the {num_layers} layers of the {stack} in\n  "
            + "\n  ".join(wrong)
        )
    for path, leaf in stacked.items():
        for layer in range(num_layers):
            name = f"{stack}/layers_{layer}/{path.removeprefix(prefix)}"
            flat[name] = np.ascontiguousarray(np.take(leaf, layer, axis))


def _share_bias(flat: dict[str, np.ndarray], stack: str, source: object) -> None:
    """Replaces the equal relative position biases of all layers of a stack by one."""
    layers = sorted({path.split("/")[1] for path in flat if path.startswith(f"{stack}/layers_")})
    biases = {layer: flat.get(f"{stack}/{layer}/{BIAS}") for layer in layers}
    if f"{stack}/{BIAS}" in flat or all(bias is None for bias in biases.values()):
        return
    first = biases["layers_0"]
    different = [layer for layer, bias in biases.items() if not np.array_equal(bias, first)]
    if different:
        raise ValueError(
            f"{source} has a relative position bias in every layer, as umT5 and a scalable T5 that "
            "was trained from scratch; this network has one for all layers of a stack. Others than "
            f"that of {stack}/layers_0 are in: {different}"
        )
    for layer in layers:
        del flat[f"{stack}/{layer}/{BIAS}"]
    flat[f"{stack}/{BIAS}"] = first
