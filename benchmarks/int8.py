"""Frozen weights as int8 beside float32: memory, answers in turns, and what the bundled models get.

    python -m benchmarks.int8 --json=benchmarks/results/cpu_int8.json
    python -m benchmarks.int8 --topology=v5e:2x2 --json=benchmarks/results/tpu_int8.json
    python -m benchmarks.int8 --quality --json=benchmarks/results/int8_quality.json

Times short inputs with random weights, so that decoding takes most of an answer; with a topology,
what the TPU compiler expects of a chip. Weights beside int8 ones are in the dtype of the
computation. The quality is that of the tasks that the bundled models were pretrained on.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from coda_jax import bundled, files, methods
from coda_jax.checkpoints import quantize
from coda_jax.checkpoints.quantization import quantized_shapes
from coda_jax.commands.bench_programs import (
    Programs,
    adapted,
    compiled_call,
    random_batch,
    random_params,
    served_shapes,
)
from coda_jax.commands.evaluate import evaluate
from coda_jax.commands.loading import load_model
from coda_jax.inference import Decoding
from coda_jax.methods import Coda, ParallelAdapter
from coda_jax.models import DEFAULT_PRESET, ModelConfig, param_shapes, preset
from coda_jax.profiling import breakdown, timing, topology

FLOAT, INT8 = "float", "int8"
SIZES = ("t5_1_1_base", "t5_1_1_large")  # whose memory is counted
OF_PROGRAMS = ("argument_bytes", "temporary_bytes")
TASKS = {  # of the bundled models: {task: (folder, feature lengths)}
    "stdlib_summary": (bundled.CODA, {"inputs": 128, "targets": 32}),
    "rendered_text": (bundled.CODA_IMAGES, {"inputs": 256, "targets": 8}),
    "spoken_digits_clean": (bundled.CODA_SPEECH, {"inputs": 200, "targets": 6}),
}


def adapted_config(name: str, dtype: Any = jnp.float32) -> ModelConfig:
    """A published size with CoDA at r = 3."""
    config = preset(name, dtype=dtype, dropout_rate=0.0)
    return config.replace(methods=(Coda(reduction=3.0), ParallelAdapter(bottleneck=64)))


def memory(name: str) -> dict[str, Any]:
    """Bytes of a size's frozen weights, embeddings and scales included."""
    config = adapted_config(name)

    def count(shapes):
        frozen = jax.tree.leaves(methods.partition(config, shapes)[1])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in frozen)

    shapes = param_shapes(config)
    found = {"float32": count(shapes), INT8: count(quantized_shapes(config, shapes))}
    return found | {"ratio": found["float32"] / found[INT8]}


def programs(options: argparse.Namespace, batch_size: int) -> dict[str, Programs]:
    """{kind of weights: its programs}."""
    dtype = jnp.dtype(options.dtype or ("bfloat16" if options.topology else "float32"))
    config = adapted_config(options.preset, dtype.type)
    batch = random_batch(config, batch_size, options.input_length, options.target_length)
    if options.topology:
        shapes = served_shapes(config)
        each = {FLOAT: shapes, INT8: quantized_shapes(config, shapes)}
    else:
        params = adapted(config, random_params(config.dense(), dtype))
        each = {FLOAT: params, INT8: jax.device_put(quantize(config, params))}
    return {kind: Programs(config, params, batch) for kind, params in each.items()}


def answers(options: argparse.Namespace, batch_size: int) -> dict[str, dict[str, Any]]:
    """{kind of weights: its time or cycles, and the memory of its program}."""
    pairs = {kind: p.end_to_end() for kind, p in programs(options, batch_size).items()}
    if options.topology:
        found = {kind: topology.compile_for(options.topology, *p) for kind, p in pairs.items()}
        parts = breakdown.parts_of(adapted_config(options.preset))
        return {kind: topology.row(p, found[FLOAT], None, parts) for kind, p in found.items()}
    compiled = {kind: compiled_call("end_to_end", *pair) for kind, pair in pairs.items()}
    calls = {kind: call for kind, (_, call) in compiled.items()}
    timings = timing.time_interleaved(calls, options.rounds)
    rows = {}
    for kind, taken in timings.items():
        middle, *quartiles = timing.speed_up(timings[FLOAT], taken)
        sizes = compiled[kind][0].memory_analysis()
        rows[kind] = {
            "ms": 1e3 * taken.median,
            "speed_up": middle,
            "quartiles": quartiles,
            "argument_bytes": sizes.argument_size_in_bytes,
            "temporary_bytes": sizes.temp_size_in_bytes,
        }
    return rows


def quality() -> dict[str, dict[str, Any]]:
    """{task: {kind of weights: metrics}} of the bundled models."""
    from coda_jax.tasks import offline, offline_images, offline_speech  # noqa: F401

    found = {}
    for task, (folder, lengths) in TASKS.items():
        rows = {}
        for kind, given in ((FLOAT, None), (INT8, INT8)):
            model = load_model(
                str(folder), adapter_checkpoint=str(folder / "adapter"), quantize=given
            )
            rows[kind] = evaluate(model, task, lengths, Decoding())[task]
        found[task] = rows
    return found


def table(found: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = []
    for name, row in found.get("memory", {}).items():
        lines.append(f"{name}: {row['float32']:,} bytes as float32, {row[INT8]:,} as int8")
        lines[-1] += f", {row['ratio']:.3f} times less"
    for name, rows in found.get("answers", {}).items():
        for kind, row in rows.items():
            cost = f"{row['ms']:.1f} ms" if "ms" in row else f"{row['cycles'] / 1e6:.2f} M cycles"
            spread = "({:.2f}-{:.2f})".format(*row["quartiles"]) if "quartiles" in row else ""
            sizes = ", ".join(f"{row[x] / 1e6:,.0f} MB" for x in OF_PROGRAMS)
            lines.append(f"batch {name}, {kind}: {cost}, {row['speed_up']:.2f}x {spread}, {sizes}")
    for task, rows in found.get("quality", {}).items():
        lines += [f"{task}, {kind}: {metrics}" for kind, metrics in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default=DEFAULT_PRESET)
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--input_length", type=int, default=64)
    parser.add_argument("--target_length", type=int, default=32)
    parser.add_argument("--dtype", help="float32; bfloat16 with a topology")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--topology", type=topology.checked, help="such as v5e:2x2")
    parser.add_argument("--quality", action="store_true", help="of the bundled models, and no more")
    parser.add_argument("--json", help="file for the report")
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    found = {"settings": settings, "versions": timing.versions()}
    if options.quality:
        found["quality"] = quality()
    else:
        found["memory"] = {name: memory(name) for name in SIZES}
        found["answers"] = {str(n): answers(options, n) for n in options.batch_sizes}
    print(table(found))
    if options.json:
        files.write_json(options.json, found)


if __name__ == "__main__":
    main()
