"""Where arrays live: divided over the devices of all processes, or over the chips of a pod."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
from typing import Any

from flax.linen import partitioning
import jax
from jax._src import mesh as mesh_lib
from jax.experimental import mesh_utils
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
    """Devices as a mesh of "data" and "model", over which `AXIS_RULES` divide arrays and programs.

    Attributes:
        mesh: the devices.
        replicated: what is whole on each of them.
    """

    def __init__(
        self,
        mesh: Mapping[str, int] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Args:
            mesh: as of `checked_mesh`.
            devices: None for all, those of other processes too.
        """  # fmt: skip
        devices = list(devices or jax.devices())
        sizes = checked_mesh("MESH", mesh, len(devices))
        # Where chips along one axis are not a whole side of a pod, the sides are split.
        laid_out = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices=devices, allow_split_physical_axes=True
        )
        self.mesh = Mesh(laid_out, MESH_AXES)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self._by_row = NamedSharding(self.mesh, PartitionSpec("data"))

    def check(self, name: str, size: int, axis: str) -> None:
        """Raises ValueError, naming it, where a size does not divide along an axis of the mesh."""
        if size % self.mesh.shape[axis]:
            raise ValueError(
                f"{name} must be a multiple of the {self.mesh.shape[axis]} devices along {axis!r} "
                f"of the MESH, got {size}"
            )

    def shapes(self, tree: Any, axes: Mapping[str, Sequence[str | None]]) -> Any:
        """Parameters, or what is kept beside them, as shapes that say how they are divided.

        Args:
            tree: where the path of a leaf ends with that of a parameter, it is the parameter, its
                gradient or what an optimizer keeps of it. Other leaves are whole, and so is an axis
                that the devices along it cannot share evenly.
            axes: {path of a parameter: the logical names of its axes}.
        """

        def placed(path, leaf):
            keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
            # Of a quantised parameter each part has an attribute's name behind the path.
            stops = (len(keys), len(keys) - 1)
            ends = ("/".join(keys[i:stop]) for stop in stops for i in range(stop))
            logical = next((tuple(axes[end]) for end in ends if end in axes), ())
            spec = partitioning.logical_to_mesh_axes(logical, AXIS_RULES)
            shape = np.shape(leaf)
            if len(logical) != len(shape):  # such as what Adafactor keeps of a matrix
                spec = ()
            sizes = (self.mesh.shape.get(axis, 1) for axis in spec)
            spec = [
                axis if length % size == 0 else None
                for length, size, axis in zip(shape, sizes, spec, strict=False)
            ]
            sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(placed, tree)

    def params(self, tree: Any, axes: Mapping[str, Sequence[str | None]]) -> Any:
        """The tree on the devices, copied: no part of it is the caller's.

        Each device gets its part alone, so that no device need hold the whole.

        Args:
            tree: as of `shapes`; arrays of numpy or JAX.
            axes: likewise.
        """

        return divided_as(self.shapes(tree, axes), tree)

    def rows(self, batch: Any) -> Any:
        """The arrays of a batch as shapes that say how they are divided."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=self._by_row), batch
        )

    def batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch, its rows shared out over the devices along "data".

        Args:
            batch: the whole of it, the same in every process.

        Raises:
            ValueError: the rows do not divide evenly.
        """
        self.check("the rows of a batch", len(next(iter(batch.values()))), "data")
        shapes = {name: np.shape(rows) for name, rows in batch.items()}
        return jax.make_array_from_process_local_data(self._by_row, dict(batch), shapes)

    @contextlib.contextmanager
    def divided(self) -> Iterator[None]:
        """What is traced in this block is divided as the network asks for."""
        with jax.set_mesh(self.mesh), partitioning.axis_rules(AXIS_RULES):
            yield


def divided_as(like: Any, tree: Any) -> Any:
    """A tree's arrays on devices, copied; each is given its part alone.

    Args:
        like: arrays, or shapes, that say how theirs are divided.
        tree: arrays of numpy or JAX, the same in every process.
    """

    def placed(leaf, shape):
        values = np.asarray(leaf)
        return jax.make_array_from_callback(
            values.shape, shape.sharding, lambda index: np.array(values[index])
        )

    return jax.tree.map(placed, tree, like)


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


@contextlib.contextmanager
def mapped_over_rows() -> Iterator[str | None]:
    """While open, a single row is traced: gives the axis of the mesh that divides the batch."""
    rules = [*partitioning.get_axis_rules()]
    of_row = [(name, None if name == "batch" else x) for name, x in rules]
    with partitioning.axis_rules(of_row):
        yield dict(rules).get("batch")


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
        of = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        raise ValueError(
            f"{name} must be of all {num_devices} devices{of}, got {product} = "
            f"{math.prod(sizes.values())}"
        )
    return sizes
