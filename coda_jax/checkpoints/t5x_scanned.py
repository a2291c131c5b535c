"""Between the parameter tree of T5X's scalable T5 and that of its T5, which is ours.

The scalable T5 keeps each kind of parameter of a stack in one array with an axis over the layers
(`encoder/encoder/mlp/wo/kernel` in place of `encoder/layers_N/mlp/wo/kernel`), attention kernels
with the heads as an axis of their own, and a relative position bias in every layer.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from coda_jax import trees

STACKS = ("encoder", "decoder")
NORM = r"pre_\w+_layer_norm/scale"
HEADS = r"attention/(query|key|value)/kernel$"  # [D, H, head_dim]
OUT = r"attention/out/kernel$"  # [H, head_dim, D]
BIAS = "relpos_bias/rel_embedding"
_AXIS = 1  # of the layers, T5X's default
_LAYER = r"(encoder|decoder)/layers_(\d+)/(.*)"
_LEAVES = (  # all that it has, under the names of T5X's T5
    r"token_embedder/embedding",
    r"encoder/encoder_norm/scale",
    r"decoder/(decoder_norm/scale|logits_dense/kernel)",
    rf"(encoder|decoder)/(layers_\d+/)?{BIAS}",
    rf"(encoder|decoder)/layers_\d+/{NORM}",
    r"(encoder|decoder)/layers_\d+/(\w+_)?attention/(query|key|value|out)/kernel",
    r"(encoder|decoder)/layers_\d+/mlp/(wi|wi_\d|wo)/kernel",
)
_FIXED = {  # what its network does, under the names of our fields
    "pad_id": 0,
    "decoder_start_id": 0,
    "relpos_num_buckets": 32,
    "relpos_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "layer_sizes": (),
}


def is_stacked(path: str) -> bool:
    """Whether a leaf is of all layers of a stack, as a scalable T5 has them."""
    return path.startswith(tuple(f"{stack}/{stack}/" for stack in STACKS))


def is_scalable(shapes: Mapping[str, tuple[int, ...] | None]) -> bool:
    """Whether a table of leaves is that of a scalable T5, with its layers stacked or not.

    Args:
        shapes: {path: shape}, None for a shape that is not known.
    """
    return any(
        is_stacked(path) or (len(shape or ()) == 3 and re.search(f"{HEADS}|{OUT}", path))
        for path, shape in shapes.items()
    )


def to_layers(flat: Mapping[str, np.ndarray], source: object) -> dict[str, np.ndarray]:
    """Renames and reshapes the leaves of a scalable T5; arrays may be views of those given.

    The biases of a stack become one where all its layers have the same, in both stacks; in umT5,
    and a scalable T5 that was trained from scratch, each layer keeps its own.

    Args:
        flat: {path: array}.
        source: the checkpoint, for errors.

    Raises:
        ValueError: if the arrays of a stack do not agree in the number of layers.
    """
    flat = dict(flat)
    for stack in STACKS:
        _unstack(flat, stack, source)
    for path, leaf in flat.items():
        if leaf.ndim == 3 and re.search(HEADS, path):
            flat[path] = leaf.reshape(leaf.shape[0], -1)
        elif leaf.ndim == 3 and re.search(OUT, path):
            flat[path] = leaf.reshape(-1, leaf.shape[2])
    _share_biases(flat)
    return dict(sorted(flat.items()))


def _unstack(flat: dict[str, np.ndarray], stack: str, source: object) -> None:
    """Replaces the stacked leaves of a stack by those of its layers."""
    prefix = f"{stack}/{stack}/"
    stacked = {path: flat.pop(path) for path in list(flat) if path.startswith(prefix)}
    if not stacked:
        return
    scales = [leaf for path, leaf in stacked.items() if re.fullmatch(prefix + NORM, path)]
    reference = flat.get(f"{stack}/{stack}_norm/scale")
    if reference is None or not scales or scales[0].ndim != 2:
        raise ValueError(
            f"{source} has stacked layers in {prefix}, but not the norms that say how: "
            f"{stack}/{stack}_norm/scale and {prefix}pre_..._layer_norm/scale."
        )
    # Where the sizes do not decide, T5X's default is taken: [D, layers].
    axis = _AXIS if scales[0].shape[0] == reference.shape[0] else 0
    num_layers = scales[0].shape[axis]
    wrong = [f"{path} {leaf.shape}" for path, leaf in stacked.items()
             if leaf.ndim < 2 or leaf.shape[axis] != num_layers]  # fmt: skip
    if wrong:
        raise ValueError(
            f"{source}: axis {axis} should be the {num_layers} layers of the {stack} in\n  "
            + "\n  ".join(wrong)
        )
    for path, leaf in stacked.items():
        for layer, part in enumerate(np.moveaxis(leaf, axis, 0)):
            flat[f"{stack}/layers_{layer}/{path.removeprefix(prefix)}"] = part


def _share_biases(flat: dict[str, np.ndarray]) -> None:
    """Replaces the biases of layers by one for each stack, where all of a stack are equal."""
    of_layers = {
        stack: [path for path in flat if re.fullmatch(rf"{stack}/layers_\d+/{BIAS}", path)]
        for stack in STACKS
    }
    pairs = [(path, paths[0]) for paths in of_layers.values() for path in paths]
    if all(np.array_equal(flat[path], flat[first]) for path, first in pairs):
        shared = {f"{path.split('/')[0]}/{BIAS}": flat[first] for path, first in pairs}
        for path, _ in pairs:
            del flat[path]
        flat |= shared


def to_scanned(config: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of T5X's scalable T5, layers stacked along axis 1: the inverse of `to_layers`.

    Args:
        config: the model's.
        params: its tree of leaves.

    Raises:
        ValueError: that network has no place for a leaf, as those of methods, or computes something
            else.
    """
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    unknown = [path for path in flat if not any(re.fullmatch(known, path) for known in _LEAVES)]
    if unknown:
        raise ValueError(
            f"T5X's scalable T5 has no place for {len(unknown)} leaves of this model, such as "
            f"{unknown[0]}; without SCAN_LAYERS they are written layer by layer, for our network"
        )
    other = {name: getattr(config, name, None) for name in _FIXED}
    other = {name: value for name, value in other.items() if value != _FIXED[name]}
    if other or not config.num_decoder_layers:
        other = other or {"num_decoder_layers": 0}
        raise ValueError(f"T5X's scalable T5 does not compute what this model does: {other}")
    sizes = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    parts: dict[str, list[np.ndarray]] = {}
    for path, leaf in sorted(flat.items(), key=lambda item: _layer(item[0])):
        stack = path.split("/")[0]
        if re.search(HEADS, path):
            leaf = leaf.reshape(leaf.shape[0], config.num_heads, -1)
        elif re.search(OUT, path):
            leaf = leaf.reshape(config.num_heads, -1, leaf.shape[1])
        if found := re.fullmatch(_LAYER, path):
            parts.setdefault(f"{stack}/{stack}/{found[3]}", []).append(leaf)
        elif path == f"{stack}/{BIAS}":
            parts[f"{stack}/{path}"] = [leaf] * sizes[stack]
        else:
            parts[path] = [leaf]
    return trees.unflatten(
        {path: np.stack(x, _AXIS) if is_stacked(path) else x[0] for path, x in parts.items()}
    )


def _layer(path: str) -> int:
    found = re.fullmatch(_LAYER, path)
    return int(found[2]) if found else -1
