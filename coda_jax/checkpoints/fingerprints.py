"""SHA-256 of leaves: which base an adapter or a run belongs to, and whether files are as saved."""

from collections.abc import Mapping
import hashlib
from typing import Any

import numpy as np

from coda_jax import trees
from coda_jax.nn.quantized import Quantized


def add_leaf(digest: Any, leaf: Any, prefix: str = "") -> None:
    """Adds a leaf's shape, dtype and bytes to a digest."""
    array = np.ascontiguousarray(leaf)
    digest.update(f"{prefix}{array.shape} {array.dtype.name}\n".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)


def leaf_sha256(leaf: Any) -> str:
    """The SHA-256 of a leaf: its shape, dtype and bytes; of a quantised one, that of its origin."""
    if isinstance(leaf, Quantized):
        return leaf.origin
    digest = hashlib.sha256()
    add_leaf(digest, leaf)
    return digest.hexdigest()


def fingerprints(params: Mapping[str, Any]) -> dict[str, str]:
    """{path: SHA-256} of the leaves of a tree."""
    return {path: leaf_sha256(leaf) for path, leaf in trees.flatten(params).items()}
