"""Where arrays live: on the devices of one host, or divided over the chips of a pod."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
from typing import Any

from flax.linen import partitioning
import jax
from jax._src import mesh as mesh_lib
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from coda_jax import checks

# What divides a logical axis of an array, as by T5X's defaults: rows of a batch lie along "data",
# heads and hidden channels along "model".
AXIS_RULES = (
    ("batch", "data"),
    ("vocab", "model"),
    ("embed", None),
    ("mlp", "model"),
    ("heads", "model"),
    ("kv", None),
    ("joined_kv", "model"),
    ("relpos_buckets", None),
    ("abspos_buckets", None),
    ("length", None),
    ("layers", None),
    ("stack", None),
    ("mlp_activations", None),
)
MESH_AXES = ("data", "model")


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


class Pod:
    """Many devices as a mesh of "data" and "model", over which `AXIS_RULES` divide a program.

    Attributes:
        mesh: the devices.
    """

    def __init__(self, devices: Sequence[jax.Device], mesh: Mapping[str, int]):
        """Args:
            devices: as many as the mesh has.
            mesh: as of `checked_mesh`.
        """  # fmt: skip
        shape = tuple(mesh[axis] for axis in MESH_AXES)
        # Where chips along one axis are not a whole side of the pod, the sides are split.
        laid_out = mesh_utils.create_device_mesh(
            shape, devices=devices, allow_split_physical_axes=True
        )
        self.mesh = Mesh(laid_out, MESH_AXES)

    def shapes(self, arguments: Any, axes: Mapping[str, Sequence[str | None]]) -> Any:
        """Arguments of a program as shapes that say how they are divided.

        Args:
            arguments: a tree. Where the path of a leaf ends with that of a parameter, it is the
                parameter, its gradient or what an optimizer keeps of it; others are rows.
            axes: {path of a parameter: the logical names of its axes}.

        Raises:
            ValueError: an axis does not divide evenly; it is named.
        """

        def placed(path, leaf):
            keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
            ends = ("/".join(keys[start:]) for start in range(len(keys)))
            name = next((end for end in ends if end in axes), None)
            if name is None:
                spec = PartitionSpec(*["data"][: np.ndim(leaf)])
            else:
                spec = partitioning.logical_to_mesh_axes(tuple(axes[name]), AXIS_RULES)
            self._check(name or "/".join(keys), np.shape(leaf), spec)
            sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
            return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(placed, arguments)

    def _check(self, name, shape, spec):
        for size, axis in zip(shape, spec, strict=False):
            if axis is not None and size % self.mesh.shape[axis]:
                raise ValueError(
                    f"{self.mesh.shape[axis]} chips along {axis!r} of the MESH do not divide the "
                    f"{size} of {name} {shape}"
                )

    @contextlib.contextmanager
    def divided(self) -> Iterator[None]:
        """What is lowered in this block is divided as the network asks for."""
        with jax.set_mesh(self.mesh), partitioning.axis_rules(AXIS_RULES):
            yield


def num_parts(logical_axis: str, size: int) -> int:
    """Parts into which an axis is divided over the devices of what is being traced.

    Args:
        logical_axis: its name in `AXIS_RULES`.
        size: of the axis.
    """
    (axis,) = partitioning.logical_to_mesh_axes((logical_axis,)) or (None,)
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        # That of T5X's `with mesh:`, which nothing public shows.
        mesh = mesh_lib.thread_resources.env.physical_mesh
    return math.gcd(mesh.shape.get(axis, 1), size)


def checked_mesh(name: str, mesh: Mapping[str, int] | None, num_devices: int) -> dict[str, int]:
    """{"data": ..., "model": ...}: how many devices lie along each axis.

    Args:
        name: of the option.
        mesh: what is asked for, 1 where an axis is left out; None for all devices along "data".
        num_devices: that there are.

    Raises:
        ValueError: it is no such dictionary, or of another number of devices.
    """
    if mesh is None:
        mesh = {"data": num_devices}
    if not isinstance(mesh, Mapping) or not mesh or set(mesh) - set(MESH_AXES):
        raise checks.wrong(name, "a dictionary such as {'data': 4, 'model': 2}", mesh)
    sizes = {axis: checks.COUNT(f"{name}[{axis!r}]", mesh.get(axis, 1)) for axis in MESH_AXES}
    if math.prod(sizes.values()) != num_devices:
        product = " x ".join(map(str, sizes.values()))
        raise ValueError(
            f"{name} must be of all {num_devices} chips, got {product} = "
            f"{math.prod(sizes.values())}"
        )
    return sizes
