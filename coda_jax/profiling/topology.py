"""Programs for TPUs that are not there: chips of a topology, compiling for them, what comes out."""

from collections import Counter
from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
import numpy as np

from coda_jax.optional import needs
from coda_jax.profiling import tpu
from coda_jax.profiling.breakdown import OTHER, Parts, part_of
from coda_jax.sharding import Placement

# Otherwise libtpu asks a TPU's host for these, and there is none.
_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that was compiled for a chip.

    Attributes:
        cost: in cycles.
        flops: by XLA, and those of its custom calls.
        lower_seconds: of tracing the function and lowering it to XLA's input.
        compile_seconds: of XLA.
        argument_bytes: on each chip.
        temporary_bytes: on each chip.
        fits: whether a chip's memory holds both, and what the program returns.
    """

    cost: tpu.Cost
    flops: float
    lower_seconds: float
    compile_seconds: float
    argument_bytes: int
    temporary_bytes: int
    fits: bool

    def parts(self, parts: Parts) -> dict[str, float]:
        """{part: share of the cycles}, as of `breakdown.parts_of`."""
        shares = dict.fromkeys([*parts, OTHER, tpu.WAITING], 0.0)
        for scope, cycles in self.cost.cycles.items():
            part = scope if scope == tpu.WAITING else part_of(scope, parts)
            shares[part] += cycles / self.cost.total
        return shares

    def collectives(self, parts: Parts) -> list[dict[str, Any]]:
        """{"kind", "part", "count", "bytes"} of what chips reduce or exchange, the most first."""
        counts, sizes = Counter(), Counter()
        for (kind, path), count in self.cost.collectives.items():
            # The last is no scope but the operation, which may be a `gather` of something else.
            part = part_of(path.rpartition("/")[0], parts)
            counts[kind, part] += count
            sizes[kind, part] += self.cost.collective_bytes[kind, path]
        return [
            {"kind": kind, "part": part, "count": counts[kind, part], "bytes": size}
            for (kind, part), size in sizes.most_common()
        ]

    def report(self, parts: Parts) -> dict[str, Any]:
        """What a report says of the program, by parts as of `breakdown.parts_of`."""
        return {
            "cycles": self.cost.total,
            "guessed": self.cost.guessed_share,
            "unknown_loops": dict(sorted(self.cost.loops.items())),
            "flops": self.flops,
            "lower_seconds": self.lower_seconds,
            "compile_seconds": self.compile_seconds,
            "argument_bytes": self.argument_bytes,
            "temporary_bytes": self.temporary_bytes,
            "fits": self.fits,
            "parts": self.parts(parts),
        }


class TooLargeError(Exception):
    """A program that a chip's memory does not hold; the message says what it would take."""


# "... (405.65G) exceeds available HBM (15.75G)", "Used 18.92G of 15.75G hbm."
_REFUSED = re.compile(r"Ran out of memory .*")
_SIZES = re.compile(r"([\d.]+[KMGT])\)? (?:exceeds available HBM \(|of )([\d.]+[KMGT])")


def _too_large(message: str) -> TooLargeError:
    sizes = _SIZES.search(message)
    return TooLargeError("needs {}iB of {}iB".format(*sizes.groups()) if sizes else message)


def checked(text: str) -> str:
    """A topology such as "v5e:2x2", checked.

    Raises:
        ValueError: another text.
    """
    if not re.fullmatch(rf"({'|'.join(tpu.CHIPS)}):\d+x\d+(x\d+)?", text):
        raise ValueError(
            f"a topology is a chip ({', '.join(tpu.CHIPS)}) and a shape, such as v5e:2x2 or "
            f"v4:2x2x1; got {text!r}"
        )
    return text


def chip(text: str) -> tpu.Chip:
    """The kind of chip of a topology."""
    return tpu.CHIPS[checked(text).split(":")[0]]


def chips(text: str, whole: bool = False) -> list[jax.Device]:
    """The chips of a topology; of v4 the cores, two for each chip, unless `whole`.

    Raises:
        ValueError: libtpu does not know it.
        ModuleNotFoundError: there is no libtpu.
    """
    with needs("tpu"):
        import libtpu  # noqa: F401
    os.environ.update({name: value for name, value in _HOST.items() if name not in os.environ})
    options = {"chip_config_name": "megacore"} if whole and text.startswith("v4:") else {}
    try:
        description = topologies.get_topology_desc(checked(text), platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"no topology {text!r}, such as v5e:2x2, v5e:4x4 or v4:2x2x2: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return list(np.ravel(description.devices))


def compile_for(
    name: str, function: Callable, arguments: Any, pod: Placement | None = None
) -> Program:
    """Compiles a function for one chip of a topology, or for all of them.

    Args:
        name: of the topology.
        function: to be compiled, or already jitted.
        arguments: arrays or their shapes; for a pod, shapes that say how they are divided.
        pod: all chips of the topology; None for one.

    Raises:
        TooLargeError: the compiler finds no way to stay within a chip's memory.
    """
    if pod is None:
        place = SingleDeviceSharding(chips(name)[0])

        def shape(x):
            return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place)

        arguments = jax.tree.map(shape, arguments)
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    start = time.perf_counter()
    with pod.divided() if pod else contextlib.nullcontext():
        lowered = jitted.lower(*arguments)
    middle = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if refused := _REFUSED.search(str(error)):
            raise _too_large(refused.group()) from error
        raise
    seconds = middle - start, time.perf_counter() - middle
    cost = tpu.cost(compiled, chip(name))
    memory = compiled.memory_analysis()
    taken = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0) + cost.flops
    return Program(cost, flops, *seconds, *taken, fits=sum(taken) + returned <= chip(name).memory)


def row(
    program: Program, baseline: Program | None, bound: float | None, parts: Mapping
) -> dict[str, Any]:
    """What a report says of a program beside that of the baseline.

    Args:
        program: of a method.
        baseline: of the same measure; None where it does not fit.
        bound: the ratio of their operations; None where it is not known.
        parts: as of `breakdown.parts_of`.
    """
    speed_up = baseline.cost.total / program.cost.total if baseline else None
    return {
        **program.report(parts),
        "speed_up": speed_up,
        "bound": bound,
        "fraction_of_bound": speed_up / bound if bound and speed_up else None,
    }
