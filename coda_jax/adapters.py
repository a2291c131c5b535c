"""Many adapters of one base in place on devices, so that each row of a batch may have its own.

Their trained leaves are stacked, with places for a power of two of adapters. A batch takes the
leaves of its rows out of the stack before its program runs, so that the program is the same however
many adapters there are: to add or replace one compiles nothing. Only when the stack is full does it
grow to twice its size, and the two small programs that write and read it are compiled again.
"""

from collections.abc import Mapping, Sequence
import functools
import os
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from coda_jax import checks, methods, processes, trees
from coda_jax.checkpoints.adapter import load_adapter
from coda_jax.checkpoints.fingerprints import fingerprints
from coda_jax.checkpoints.swap_in import encoder_of
from coda_jax.data.batches import rounded_up
from coda_jax.methods.combining import check_same_base
from coda_jax.models import ModelConfig, param_axes, param_shapes
from coda_jax.nn.quantized import quantization_of
from coda_jax.sharding import Placement

# The folder of an adapter file, or (config, whole parameter tree) as `load_adapter` returns them.
Adapter = str | os.PathLike | tuple[ModelConfig, Mapping[str, Any]]
Names = Sequence[str] | None  # of the adapters of inputs, one for each; None where there are none
_SHOWN = 20  # names in an error


class Adapters:
    """The trained leaves of adapters of one base, by name.

    Args:
        config: of the base; how it computes, all adapters compute.
        params: the base's parameters; they are kept, for what is added later.
        adapters: {name: adapter}, at least one.
        placement: the devices.

    Attributes:
        config: of the model with any of them.
        frozen: the leaves of the base, which they share.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as of `add`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        adapters: Mapping[str, Adapter],
        placement: Placement,
    ):
        if not adapters:
            raise ValueError("adapters={}: there must be one at least, which says the methods")
        self._base, self._placement = (config, params), placement
        name, first = next(iter(adapters.items()))
        read = self._read(first)
        computed = {field: getattr(config, field) for field in config.run_fields}
        self.config = read[0].replace(**computed)
        if config.methods not in ((), self.config.methods):
            raise ValueError(
                f"the config has {config.methods}, adapter {name!r} {self.config.methods}"
            )
        self.frozen = self._frozen_of_base(name)
        own = trees.flatten(methods.partition(*read)[0])
        self._expected = placement.shapes(own, param_axes(self.config))
        self._slots: dict[str, int] = {}
        self._stack: dict[str, Array | np.ndarray] = {}
        self._reserve(rounded_up(len(adapters), 1))
        for other, adapter in adapters.items():
            self._put(other, *(read if other == name else self._read(adapter)))

    @property
    def names(self) -> Sequence[str]:
        """Of the adapters, in the order in which they came."""
        return [*self._slots]

    def add(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter, or puts it in the place of the one of that name.

        Args:
            name: by which inputs ask for it.
            adapter: what it is.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it belongs to another base, or has other methods, fields or leaves. What was
                there stays.
            FloatingPointError: a leaf is not finite.
        """
        self._put(name, *self._read(adapter))

    def of_rows(self, names: Sequence[str], size: int) -> dict[str, Any]:
        """The tree of trained leaves [B, ...], a row for each name and spare ones up to B.

        Args:
            names: of the rows' adapters, which are known.
            size: B.
        """
        slots = np.zeros(size, np.int32)
        slots[: len(names)] = [self._slots[name] for name in names]
        placed = self._placement.batch({"slots": slots})["slots"]
        return trees.unflatten(self._programs["take"](self._stack, placed))

    def _frozen_of_base(self, name):
        config, params = self._base
        if not self.config.num_decoder_layers:
            config, params = encoder_of(config, params)
        expected, shared = methods.partition(self.config, param_shapes(self.config))
        if not expected or not shared:
            what = "every leaf: it is a base of its own" if expected else "nothing"
            raise ValueError(f"adapter {name!r} trains {what}")
        frozen = methods.partition(self.config, params)[1]
        trees.check_tree(shared, frozen, what="the base parameters do")
        return frozen

    @functools.cached_property
    def _known(self):
        """The fingerprints of the base, which are the same for all adapters."""
        return fingerprints(self._base[1])

    def _read(self, adapter):
        if isinstance(adapter, str | os.PathLike):
            return load_adapter(adapter, *self._base, known=self._known)
        return adapter

    def _put(self, name, config, params):
        checks.text("the name of an adapter", name)
        self._check_config(name, config)
        own, frozen = methods.partition(config, params)
        kinds = [quantization_of(leaves) or "float" for leaves in (frozen, self.frozen)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"adapter {name!r} is on {kinds[0]} weights, the base has {kinds[1]} ones: "
                "QUANTIZE='int8', or `quantize`, is for all of them"
            )
        try:
            check_same_base(trees.flatten(self.frozen), trees.flatten(frozen))
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error
        leaves = trees.flatten(own)
        trees.check_tree(self._expected, leaves, what=f"the leaves of adapter {name!r} do")
        if kinds := [x for x in leaves if leaves[x].dtype != self._expected[x].dtype]:
            found, expected = leaves[kinds[0]].dtype, self._expected[kinds[0]].dtype
            raise ValueError(f"adapter {name!r}: {kinds[0]} is {found}, not {expected}")
        trees.check_finite(leaves)
        processes.check_same(f"the adapter {name!r}", leaves.values)
        slot = self._slots.get(name, len(self._slots))
        if slot == len(next(iter(self._stack.values()))):
            self._reserve(2 * slot)
        placed = self._placement.params(leaves, param_axes(self.config))
        self._stack = self._programs["put"](self._stack, placed, np.int32(slot))
        self._slots[name] = slot

    def _check_config(self, name, config):
        """Raises ValueError for the config of another model, or other fields of a method."""
        if config.family != self.config.family:
            raise ValueError(
                f"adapter {name!r} is of a {config.family!r}, the base a {self.config.family!r}"
            )
        if different := config.differences(self.config, config.run_fields):
            raise ValueError(f"adapter {name!r} differs from the others: {'; '.join(different)}")

    def _reserve(self, places):
        """Makes the stack one of so many places, the new ones empty."""
        if not self._stack:
            self._stack = {x: np.zeros((0, *s.shape), s.dtype) for x, s in self._expected.items()}
        grown = jax.jit(
            lambda stack: jax.tree.map(
                lambda x: jnp.pad(x, ((0, places - len(x)), *[(0, 0)] * (x.ndim - 1))), stack
            ),
            out_shardings=self._divided(None),
        )
        self._stack = grown(self._stack)

    @functools.cached_property
    def _programs(self):
        """What writes an adapter into the stack, and what takes those of rows out of it."""

        def put(stack, leaves, slot):
            return jax.tree.map(lambda x, leaf: x.at[slot].set(leaf), stack, leaves)

        def take(stack, slots):
            return jax.tree.map(lambda x: x.at[slots].get(mode="promise_in_bounds"), stack)

        return {
            "put": jax.jit(put, donate_argnums=0, out_shardings=self._divided(None)),
            "take": jax.jit(take, out_shardings=self._divided("data")),
        }

    def _divided(self, axis):
        """How leaves with one more axis in front are divided."""
        return {
            path: NamedSharding(self._placement.mesh, PartitionSpec(axis, *leaf.sharding.spec))
            for path, leaf in self._expected.items()
        }


def checked_names(
    adapters: Adapters | None, names: Names, count: int, first: int
) -> Sequence[str | None]:
    """The names of the adapters of some inputs; None for each, where there are no adapters.

    Args:
        adapters: that there are.
        names: what is asked for.
        count: of the inputs.
        first: number of the first of them.

    Raises:
        ValueError: an input has none, or an unknown one; or there are none.
    """
    if adapters is None:
        if names is not None:
            raise ValueError("inputs name adapters, and the model was made without: adapters={...}")
        return [None] * count
    if names is None or len(names) != count:
        found = "none" if names is None else f"{len(names)} of them"
        raise ValueError(f"{count} inputs need the names of their adapters, got {found}")
    for number, name in enumerate(names, start=first):
        if (why := unknown(name, adapters.names)) is not None:
            raise ValueError(f"input {number} (the first is 0): {why}")
    return names


def unknown(name: Any, names: Sequence[str]) -> str | None:
    """Why a name is none of those that there are; None where it is one."""
    if name in names:
        return None
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"no adapter is called {name!r}; there are {', '.join(names[:_SHOWN])}{more}"
