"""Where arrays live: parameters on every device, batches cut along their first axis."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np


class Placement:
    """The devices of one host, as a mesh with the axis "data"."""

    def __init__(self, devices=None):
        self.mesh = Mesh(np.array(devices or jax.local_devices()), ("data",))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.by_row = NamedSharding(self.mesh, PartitionSpec("data"))

    def params(self, tree: Any) -> Any:
        """The tree on every device, copied, so that a donated buffer is never the caller's."""
        return jax.tree.map(lambda x: jax.device_put(jnp.array(x), self.replicated), tree)

    def check_rows(self, name: str, rows: int) -> None:
        """Raises ValueError, naming the option, where so many rows do not divide evenly."""
        if rows % self.mesh.size:
            raise ValueError(f"{name} must be a multiple of {self.mesh.size} devices, got {rows}")

    def batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch, its rows shared out over the devices.

        Raises:
            ValueError: the rows do not divide evenly.
        """
        self.check_rows("the rows of a batch", len(next(iter(batch.values()))))
        return jax.device_put(dict(batch), self.by_row)
