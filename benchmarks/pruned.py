"""Encoders of the smaller models that uniform pruning leaves, beside the dense model's.

    python -m benchmarks.pruned --json=cpu_pruned.json
    python -m benchmarks.pruned --topology=v5e:2x2 --batch_size=32 --json=tpu_pruned.json

Times them in turns, with random weights; with a topology, what the TPU compiler expects of a chip.
The bound is the ratio of operations, which is less than one over the density: attention among the
tokens of a head costs what it did, and heads are few.
"""

import argparse
from collections.abc import Mapping
import math
from typing import Any

import jax.numpy as jnp

from coda_jax import files, trees
from coda_jax.commands.bench_programs import (
    Programs,
    compiled_call,
    operations,
    random_batch,
    random_params,
    served_shapes,
)
from coda_jax.methods import StructuredPruning
from coda_jax.models import DEFAULT_PRESET, ModelConfig, param_shapes, preset
from coda_jax.profiling import breakdown, timing, topology

DENSE = "dense"


def cut(dense: ModelConfig, density: float) -> ModelConfig:
    """The config that is left of a model where every layer keeps the same share, rounded up."""
    density = StructuredPruning(density=density).density  # checked
    fields = {field for blocks in dense.blocks.values() for field in blocks.values()}
    sizes = {field: math.ceil(density * getattr(dense, field)) for field in fields}
    return dense.replace(**sizes)


def timed(programs: Mapping[str, Programs], rounds: int) -> dict[str, dict[str, Any]]:
    """{name: its time and speed-up} on this machine."""
    calls = {name: compiled_call("encoder", *p.encoder())[1] for name, p in programs.items()}
    timings = timing.time_interleaved(calls, rounds)
    rows = {}
    for name, taken in timings.items():
        middle, *quartiles = timing.speed_up(timings[DENSE], taken)
        rows[name] = {"ms": 1e3 * taken.median, "speed_up": middle, "quartiles": quartiles}
    return rows


def in_cycles(programs: Mapping[str, Programs], name: str) -> dict[str, dict[str, Any]]:
    """{name: its cycles and speed-up} on a chip of a topology."""
    compiled = {key: topology.compile_for(name, *p.encoder()) for key, p in programs.items()}
    return {
        key: topology.row(p, compiled[DENSE], None, breakdown.parts_of(programs[key].config))
        for key, p in compiled.items()
    }


def report(options: argparse.Namespace) -> dict[str, Any]:
    """{"settings", "versions", "encoder": rows}."""
    dtype = jnp.dtype(options.dtype or ("bfloat16" if options.topology else "float32"))
    dense = preset(options.preset, dtype=dtype.type, dropout_rate=0.0)
    configs = {DENSE: dense} | {f"{d:.0%}": cut(dense, d) for d in options.densities}
    batch = random_batch(dense, options.batch_size, options.input_length, target_length=1)
    shapes = bool(options.topology)
    programs = {
        name: Programs(c, served_shapes(c) if shapes else random_params(c, dtype), batch)
        for name, c in configs.items()
    }
    rows = in_cycles(programs, options.topology) if shapes else timed(programs, options.rounds)
    count = operations(options.batch_size, options.input_length, 1)["encoder"]
    for name, row in rows.items():
        row["parameters"] = trees.count(param_shapes(configs[name])["encoder"])
        row["bound"] = count(dense) / count(configs[name])
        row["fraction_of_bound"] = row["speed_up"] / row["bound"]
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    versions = timing.versions() | ({"device": options.topology} if shapes else {})
    return {"settings": settings | {"dtype": dtype.name}, "versions": versions, "encoder": rows}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows for people."""
    lines = ["| density | parameters of the encoder | | speed-up | bound | of the bound |"]
    lines.append("|---" * 6 + "|")
    for name, row in rows.items():
        cost = f"{row['ms']:.1f} ms" if "ms" in row else f"{row['cycles'] / 1e6:.2f} M cycles"
        spread = "({:.2f}-{:.2f})".format(*row["quartiles"]) if "quartiles" in row else ""
        lines.append(
            f"| {name} | {row['parameters']:,} | {cost} | {row['speed_up']:.2f}x {spread} "
            f"| {row['bound']:.2f} | {row['fraction_of_bound']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default=DEFAULT_PRESET)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.1])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--input_length", type=int, default=512)
    parser.add_argument("--dtype", help="float32; bfloat16 with a topology")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--topology", type=topology.checked, help="such as v5e:2x2")
    parser.add_argument("--json", help="file for the report")
    options = parser.parse_args()
    found = report(options)
    print(table(found["encoder"]))
    if options.json:
        files.write_json(options.json, found)


if __name__ == "__main__":
    main()
