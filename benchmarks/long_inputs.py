"""Memory and time of encoders and training steps of long inputs.

    python -m benchmarks.long_inputs --json=benchmarks/results/cpu_long_inputs.json
    python -m benchmarks.long_inputs --rounds=3 --lengths 4096

What the compiler sets aside while a program runs (`memory_analysis().temp_size_in_bytes`), beside
arguments and results: with an array of all queries and keys, as shorter inputs are attended to, and
without one. With `--rounds`, the second of these is also run, in turns, with random weights.
"""

import argparse
from collections.abc import Mapping
import contextlib
import math
from typing import Any
from unittest import mock

import jax.numpy as jnp

from coda_jax import files
from coda_jax.commands.bench_programs import (
    Programs,
    compiled_call,
    random_batch,
    random_params,
    served_shapes,
)
from coda_jax.methods import Method, comparisons
from coda_jax.models import DEFAULT_PRESET, ModelConfig, preset
from coda_jax.nn import long_attention
from coda_jax.profiling import timing

MEASURES = ("encoder", "train_step")
TARGET_LENGTH = 16


def compared(reduction: float) -> dict[str, tuple[Method, ...]]:
    """The methods, by name."""
    return {
        comparisons.BASELINE: comparisons.baseline(),
        **comparisons.conditional((1,)),
        **comparisons.conditional((reduction,), attentions=("k_to_all", "k_to_k")),
    }


def with_arrays() -> contextlib.AbstractContextManager:
    """What is traced meanwhile has an array of all queries and keys, however long inputs are."""
    return mock.patch.object(long_attention, "_MOST_PAIRS", math.inf)


def temporary_bytes(config: ModelConfig, batch: Mapping, measure: str) -> int:
    """What a program needs beside its arguments and results; nothing is run."""
    programs = Programs(config, served_shapes(config), batch)  # nothing of which was traced before
    compiled, _ = compiled_call(measure, *getattr(programs, measure)())
    return compiled.memory_analysis().temp_size_in_bytes


def report(options: argparse.Namespace) -> dict[str, Any]:
    """{"settings", "versions", "rows"}."""
    dense = preset(options.preset, dtype=jnp.dtype(options.dtype).type, dropout_rate=0.0)
    rows = []
    for length in options.lengths:
        batch = random_batch(dense, options.batch_size, length, TARGET_LENGTH)
        for measure in options.measures:
            calls = {}
            for name, methods in compared(options.reduction).items():
                config = dense.replace(methods=methods)
                row = {"length": length, "measure": measure, "method": name}
                row["bytes"] = temporary_bytes(config, batch, measure)
                with with_arrays():
                    row["bytes_with_arrays"] = temporary_bytes(config, batch, measure)
                rows.append(row)
                print(f"| {' | '.join(cells(row))} |", flush=True)
                if options.rounds:
                    given = Programs(config, random_params(config, config.dtype), batch)
                    calls[name] = compiled_call(measure, *getattr(given, measure)())[1]
            if calls:
                taken = timing.time_interleaved(calls, options.rounds, warm_up=1)
                for row in rows[-len(calls) :]:
                    row["ms"] = 1e3 * taken[row["method"]].median
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    return {"settings": settings, "versions": timing.versions(), "rows": rows}


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row, for people."""
    sizes = [f"{row[name] / 2**20:,.0f} MiB" for name in ("bytes_with_arrays", "bytes")]
    ms = [f"{row['ms']:,.0f} ms"] if "ms" in row else []
    return [f"{row['length']:,}", row["measure"].replace("_", " "), row["method"], *sizes, *ms]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default=DEFAULT_PRESET)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--reduction", type=float, default=3.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--rounds", type=int, default=0, help="runs of each program; 0 for none")
    parser.add_argument("--json", help="file for the report")
    options = parser.parse_args()
    found = report(options)
    print("\n| tokens | | | with arrays | without | |\n" + "|---" * 6 + "|")
    for row in found["rows"]:
        print(f"| {' | '.join(cells(row))} |")
    if options.json:
        files.write_json(options.json, found)


if __name__ == "__main__":
    main()
