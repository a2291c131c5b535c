"""Times of the parts for which the method's speed depends on one function.

    python benchmarks/operators.py --json=benchmarks/results/cpu_operators.json

1. The exact soft top-k beside the paper's 20 iterations, forward and with its gradient.
2. Attention of a layer in its plain form, and as a CPU takes it.
3. A decoding step, and how fast it reads what it must (weights, keys and values) beside a sum over
   an array that no cache holds. Random weights and no end token: all lengths are reached.

Of 2 and 3 shapes are those of T5 v1.1 base, attention at batch 4, and input 512 where not said.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from coda_jax import files
from coda_jax.commands import bench_programs
from coda_jax.methods.soft_topk import SOLVERS, soft_topk
from coda_jax.models import ModelConfig, preset
from coda_jax.nn import dot_product_attention
from coda_jax.objectives import model_for
from coda_jax.profiling import flops, timing

MODEL, INPUT_LENGTH = "t5_1_1_base", 512
ATTENTION_LENGTHS = (171, 341, 512, 1024)
LENGTHS = (8, 40)  # of answers, from whose difference a step follows
STEPS = ((4, 1), (16, 1), (4, 4))  # batch, beams


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


def attention_calls(length: int, batch: int = 4) -> dict:
    """Calls of both forms of attention among so many tokens, by name."""
    config = preset(MODEL)
    rng, heads = np.random.default_rng(0), config.num_heads
    query, key, value = rng.normal(size=(3, batch, heads, length, config.head_dim))
    bias = rng.normal(size=(1, heads, length, length))
    arguments = [jnp.asarray(x, jnp.float32) for x in (query, key, value, bias)]
    arguments.append(jnp.ones((batch, 1, 1, length), bool))
    plain = functools.partial(dot_product_attention._attend, float32_logits=False)
    calls = {}
    for name, attend in (("plain", plain), ("as taken", dot_product_attention.attend)):
        compiled = jax.jit(attend).lower(*arguments).compile()
        calls[f"{name}, {length}"] = functools.partial(compiled, *arguments)
    return calls


def decoding_config() -> ModelConfig:
    """With the least of an encoder, and an end that no token is."""
    return preset(MODEL, dropout_rate=0.0, eos_id=-1, num_encoder_layers=1)


def decoding_calls() -> dict:
    """Calls of answers of two lengths for each of `STEPS`, and of a sum, by name."""
    config = decoding_config()
    model = model_for(config)
    params = jax.jit(model.init)(jax.random.key(0))
    large = jnp.ones(100_000_000)
    calls = {"sum": functools.partial(jax.jit(jnp.sum).lower(large).compile(), large)}
    for batch, beams in STEPS:
        given = bench_programs.random_batch(config, batch, INPUT_LENGTH, LENGTHS[0])
        tokens = jnp.asarray(given["encoder_input_tokens"])
        for length in LENGTHS:
            answer = functools.partial(model.predict, max_decode_length=length, num_beams=beams)
            compiled = jax.jit(answer).lower(params, tokens).compile()
            calls[f"{batch}, {beams}, {length}"] = functools.partial(compiled, params, tokens)
    return calls


def steps(ms: dict) -> dict:
    """{step: (ms, GB/s)} from the times of `decoding_calls`, and the sum's."""
    found = {"sum over 400 MB": (ms["sum"], 0.4 / ms["sum"] * 1e3)}
    for batch, beams in STEPS:
        short, long = (ms[f"{batch}, {beams}, {length}"] for length in LENGTHS)
        step = (long - short) / (LENGTHS[1] - LENGTHS[0])
        sizes = batch, INPUT_LENGTH, sum(LENGTHS) // 2, beams
        read = flops.step_bytes(decoding_config(), *sizes)
        found[f"step, batch {batch}, beams {beams}"] = step, read / step / 1e6
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10, help="ten times as many of soft top-k")
    parser.add_argument("--json", help="file for the report")
    options = parser.parse_args()
    groups = {
        "soft top-k [16, 512]": soft_topk_calls(16, 512),
        "soft top-k [16, 4096]": soft_topk_calls(16, 4096),
        "attention": {k: v for n in ATTENTION_LENGTHS for k, v in attention_calls(n).items()},
        "decoding": decoding_calls(),
    }
    report = {"versions": timing.versions(), "rounds": options.rounds, "ms": {}}
    for group, calls in groups.items():
        rounds = options.rounds * (10 if group.startswith("soft") else 1)
        timings = timing.time_interleaved(calls, rounds)
        report["ms"][group] = {name: 1e3 * taken.median for name, taken in timings.items()}
        print(f"\n**{group}**\n\n| | time |\n|---|---|")
        for name, ms in report["ms"][group].items():
            print(f"| {name} | {ms:.2f} ms |")
    report["steps"] = steps(report["ms"]["decoding"])
    print("\n| | time | reads |\n|---|---|---|")
    for name, (ms, rate) in report["steps"].items():
        print(f"| {name} | {ms:.1f} ms | {rate:.1f} GB/s |")
    if options.json:
        files.write_json(options.json, report)


if __name__ == "__main__":
    main()
