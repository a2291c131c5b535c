"""Speed and FLOPs of compiled functions, measured side by side."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import statistics
import time
from typing import Any

import jax
from tqdm import tqdm

from coda_jax import checks


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one function's runs, in the order in which they were taken.

    Attributes:
        seconds: one entry per round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds, in seconds."""
        return statistics.median(self.seconds)


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 2,
    title: str = "timing",
) -> dict[str, Timing]:
    """Times functions in turn, A B C A B C ..., so that a slow spell of the machine hits all.

    Args:
        functions: by name; each returns arrays, and a run ends when they are ready.
        rounds: runs of each that are counted.
        warm_up: runs of each before that.
        title: of the progress bar.
    """
    rounds, warm_up = checks.COUNT("rounds", rounds), checks.Whole(0)("warm_up", warm_up)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in tqdm(range(-warm_up, rounds), desc=title, unit="round", leave=False):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def speed_up(baseline: Timing, other: Timing) -> tuple[float, float, float]:
    """How many times as fast `other` is: the median of the rounds' ratios, and their quartiles."""
    ratios = [a / b for a, b in zip(baseline.seconds, other.seconds, strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def flops(compiled: jax.stages.Compiled) -> float:
    """Floating-point operations of a compiled program, by XLA's cost analysis.

    The body of a loop whose number of rounds is unknown counts once.
    """
    return float(compiled.cost_analysis()["flops"])


def peak_memory(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled program needs: arguments, results and temporaries."""
    sizes = compiled.memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return total - sizes.alias_size_in_bytes


def versions(
    packages: Sequence[str] = ("jax", "jaxlib", "flax", "numpy", "libtpu"),
) -> dict[str, str]:
    """Versions of the packages that are installed, and the device that programs run on."""
    from importlib import metadata

    device = jax.devices()[0]
    installed = {found.name for found in metadata.distributions()}
    found = {name: metadata.version(name) for name in packages if name in installed}
    return found | {"device": device.device_kind, "platform": device.platform}
