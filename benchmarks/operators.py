"""Times of the parts for which the method's speed depends on one function: soft top-k and decoding.

    python benchmarks/operators.py --json=benchmarks/results/operators.json

1. The exact soft top-k beside the paper's 20 iterations, forward and with its gradient.
2. Decoding, T5 v1.1 base shapes: greedy to 16, 32 and 64 tokens, from which the cost of a token
   follows, and beam search with 4 beams. Random weights and no end token: all lengths are reached.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from coda_jax import files
from coda_jax.commands import bench_programs
from coda_jax.methods.soft_topk import SOLVERS, soft_topk
from coda_jax.models import preset
from coda_jax.objectives import model_for
from coda_jax.profiling import timing

BATCH, INPUT_LENGTH, LENGTHS, BEAMS = 4, 512, (16, 32, 64), 4


def soft_topk_calls(batch: int, length: int, reduction: int = 3) -> dict:
    """Calls of both solvers, with and without the gradient, by name."""
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(batch, length)), jnp.float32)
    target = jnp.asarray(np.random.default_rng(1).normal(size=(batch, length)), jnp.float32)
    calls = {}
    for solver in SOLVERS:
        forward = functools.partial(soft_topk, k=-(-length // reduction), solver=solver)

        def loss(scores, forward=forward):
            return (forward(scores) * target).sum()

        for name, function in (("forward", forward), ("with gradient", jax.value_and_grad(loss))):
            compiled = jax.jit(function).lower(scores).compile()
            calls[f"{solver}, {name}"] = functools.partial(compiled, scores)
    return calls


def decoding_calls() -> dict:
    """Calls of greedy search to several lengths, and of beam search, by name."""
    config = preset("t5_1_1_base", dropout_rate=0.0, eos_id=-1)  # which no token is
    model = model_for(config)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.asarray(
        bench_programs.random_batch(config, BATCH, INPUT_LENGTH, LENGTHS[0])["encoder_input_tokens"]
    )

    def search(length, **options):
        answer = functools.partial(model.predict, max_decode_length=length, **options)
        compiled = jax.jit(answer).lower(params, tokens).compile()
        return functools.partial(compiled, params, tokens)

    calls = {f"greedy, {length}": search(length) for length in LENGTHS}
    calls[f"{BEAMS} beams, {LENGTHS[0]}"] = search(LENGTHS[0], num_beams=BEAMS)

    compiled = jax.jit(model.encode).lower(params, tokens).compile()
    return {"encoder": functools.partial(compiled, params, tokens), **calls}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10, help="ten times as many of soft top-k")
    parser.add_argument("--json", help="file for the report")
    options = parser.parse_args()
    groups = {
        "soft top-k [16, 512]": soft_topk_calls(16, 512),
        "soft top-k [16, 4096]": soft_topk_calls(16, 4096),
        f"decoding, batch {BATCH}, input {INPUT_LENGTH}": decoding_calls(),
    }
    report = {"versions": timing.versions(), "rounds": options.rounds, "ms": {}}
    for group, calls in groups.items():
        rounds = options.rounds * (10 if group.startswith("soft") else 1)
        timings = timing.time_interleaved(calls, rounds)
        report["ms"][group] = {name: 1e3 * taken.median for name, taken in timings.items()}
        print(f"\n**{group}**\n\n| | time |\n|---|---|")
        for name, ms in report["ms"][group].items():
            print(f"| {name} | {ms:.2f} ms |")
    if options.json:
        files.write_json(options.json, report)


if __name__ == "__main__":
    main()
