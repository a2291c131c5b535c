"""CoDA's speed on a GPU in bfloat16, beside the dense model with parallel adapters.

    python -m benchmarks.gpu --json=benchmarks/results/gpu.json

The tables of `coda bench` for several sizes in one process, which finds the fastest form of each
product once, and the share of the parts of a layer. Where only encoders are measured, the decoder
has one layer, so that less is made and compiled.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp

from coda_jax import files
from coda_jax.commands import bench
from coda_jax.commands.bench_programs import random_params
from coda_jax.methods import selection
from coda_jax.methods.selection import capacity, num_selected
from coda_jax.models import preset
from coda_jax.nn import position_bias
from coda_jax.nn.dot_product_attention import attend
from coda_jax.profiling import timing

ENCODER = {"measures": ("encoder",), "target_length": 16}
KERNEL_SHAPES = ((4, 171), (4, 512), (2, 1000))  # rows, tokens
CASES = {
    "large": {"batch_size": 32, "input_length": 512, "reductions": (3.0, 5.0), **ENCODER},
    "base, 4,096 tokens": {"batch_size": 8, "input_length": 4096, "reductions": (8.0,), **ENCODER},
    "xl": {"batch_size": 32, "input_length": 512, "reductions": (3.0,), **ENCODER},
    "base": {
        "batch_size": 32,
        "input_length": 512,
        "reductions": (3.0,),
        "measures": ("encoder", "end_to_end"),
        "target_length": 64,
    },
    "large, 4,096 tokens": {
        "batch_size": 8, "input_length": 4096, "reductions": (8.0,), **ENCODER
    },
    "large, parts": {
        "batch_size": 32,
        "input_length": 512,
        "reductions": (3.0,),
        "measures": ("parts",),
        "target_length": 16,
    },
}  # fmt: skip


def differences() -> dict[str, float]:
    """How far the two kernels are, at most, from what XLA makes of the plain formulation.

    Raises:
        ValueError: farther than rounding explains; then no figure is worth taking.
    """
    found = {"attention": 0.0, "routing": 0.0, "picked otherwise": 0}
    for rows, length in KERNEL_SHAPES:
        keys = jax.random.split(jax.random.key(length), 5)
        query, key, value = jax.random.normal(keys[0], (3, rows, 12, length, 64), jnp.bfloat16) / 4
        places = jnp.sort(jax.random.choice(keys[1], 2 * length, (length,), replace=False))[None]
        values = jax.random.normal(keys[2], (12, 32))
        bias = position_bias.PositionBias(values, places, places, True, 128)
        mask = jnp.arange(length) < length - jnp.arange(rows)[:, None] * 20
        arrays = query, key, value, bias, mask[:, None, None]
        with jax.default_matmul_precision("highest"):
            expected = attend(*(x.astype(jnp.float32) for x in arrays[:3]), *arrays[3:])
        error = jnp.abs(jax.jit(attend)(*arrays).astype(jnp.float32) - expected).max()
        found["attention"] = max(found["attention"], float(error))

        scores = jax.random.normal(keys[3], (rows, length))
        arguments = scores, num_selected(mask.sum(-1, keepdims=True), 3), mask
        options = {"num_slots": capacity(length, 3)}
        plain = jax.jit(functools.partial(selection._pick_and_weigh, **options, epsilon=1.0))
        taken = jax.jit(lambda s, k, mask: selection.pick_and_weigh(s, k, mask=mask, **options))  # noqa: B023
        (indices, _, expected), (found_indices, _, weights) = plain(*arguments), taken(*arguments)
        found["picked otherwise"] += int((indices != found_indices).sum())
        found["routing"] = max(found["routing"], float(jnp.abs(weights - expected).max()))
    if found["attention"] > 0.01 or found["routing"] > 1e-5 or found["picked otherwise"]:
        raise ValueError(f"a kernel is wrong on this device: {found}")
    return found


def measure(case: str, rounds: int) -> dict:
    """The report of one of `CASES`, as `coda bench` gives it."""
    settings = CASES[case]
    config = preset(f"t5_1_1_{case.split(',')[0]}", dtype=jnp.bfloat16, dropout_rate=0.0)
    if "end_to_end" not in settings["measures"]:
        config = config.replace(num_decoder_layers=1)
    start = time.monotonic()
    report = bench.measure(
        config,
        random_params(config, jnp.dtype("bfloat16")),
        attentions=("k_to_k",),
        rounds=rounds,
        show=lambda name, rows: print(f"\n{bench.table(name, rows)}", flush=True),
        **settings,
    )
    described = {"model": case, "dtype": "bfloat16", "rounds": rounds, **settings}
    seconds = round(time.monotonic() - start)
    return {"settings": described, "versions": timing.versions(), "seconds": seconds, **report}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="file for the reports")
    options = parser.parse_args()
    reports = {"differences": differences()}
    print(f"kernels, at most so far from plain programs: {reports['differences']}")
    for case in options.cases:
        print(f"\n## {case}", flush=True)
        reports[case] = measure(case, options.rounds)
        if options.json:
            files.write_json(options.json, reports)


if __name__ == "__main__":
    main()
