"""Decoding with all encoded tokens in cross-attention, and with the selected ones.

    python -m benchmarks.cross_attention --json=cpu_cross_attention.json
    python -m benchmarks.cross_attention --shapes  # the keys and values alone, in a second

The encoding is random and given, so that only the decoder is timed: greedy answers of two lengths,
in turns, from whose difference a step follows; the rest of the shorter one is what comes before the
first step, above all keys and values of the encoding. Their bytes are those of the cache, the
memory is the program's by XLA's analysis: arguments, results and temporaries.
"""

import argparse
from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from coda_jax import files, trees
from coda_jax.commands.bench_programs import compiled_call, random_batch, random_params
from coda_jax.methods import Coda, ParallelAdapter
from coda_jax.methods.coda import CROSS_ATTENTIONS
from coda_jax.methods.cross_attention import tokens_read
from coda_jax.models import DEFAULT_PRESET, ModelConfig, param_shapes, preset
from coda_jax.objectives import decoding
from coda_jax.profiling import timing

LENGTHS = (8, 40)  # of answers


def config_of(options: argparse.Namespace, cross_attention: str) -> ModelConfig:
    """With the least of an encoder."""
    methods = (Coda(options.reduction, cross_attention=cross_attention), ParallelAdapter())
    return preset(
        options.preset,
        dtype=jnp.dtype(options.dtype).type,
        dropout_rate=0.0,
        num_encoder_layers=1,
        methods=methods,
    )


def empty_cache(config: ModelConfig, places: int, params: Any, inputs: Any, encoded: Any) -> Any:
    """The decoder's cache before the first step, with keys and values of the encoding."""
    _, make_cache = decoding.steps(config.network(), params, inputs, encoded)
    return make_cache(jnp.ones((len(inputs), places), jnp.int32))


def answer(config: ModelConfig, length: int, params: Any, inputs: Any, encoded: Any) -> jax.Array:
    """The most probable tokens [B] of the last of so many steps, whatever ends before."""
    step, _ = decoding.steps(config.network(), params, inputs, encoded)
    cache = empty_cache(config, LENGTHS[-1], params, inputs, encoded)

    def after(state, _):
        logits, cache = step(*state)[:2]
        return (cache, logits.argmax(-1).astype(jnp.int32)), None

    start = cache, jnp.zeros(len(inputs), jnp.int32)
    return lax.scan(after, start, length=length)[0][1]


def arguments(config: ModelConfig, options: argparse.Namespace, length: int) -> tuple:
    """(parameters, inputs, encoding), as shapes."""
    dtype = jnp.dtype(options.dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), param_shapes(config))
    read = options.batch_size, tokens_read(config, length), config.emb_dim
    return params, config.input_spec(options.batch_size, length), jax.ShapeDtypeStruct(read, dtype)


def cross_attention_bytes(config: ModelConfig, options: argparse.Namespace, length: int) -> int:
    """Of the keys and values of the encoding in all layers."""
    make = functools.partial(empty_cache, config, LENGTHS[-1])
    cache = trees.flatten(jax.eval_shape(make, *arguments(config, options, length)))
    kinds = ("encoded_key", "encoded_value")
    return sum(x.size * x.dtype.itemsize for path, x in cache.items() if path.endswith(kinds))


def timed(options: argparse.Namespace, length: int) -> dict[str, dict[str, float]]:
    """{what is attended to: ms of a step and before the first, bytes of the longer answer}."""
    calls: dict[str, Callable] = {}
    memory, params = {}, None
    for name in CROSS_ATTENTIONS:
        config = config_of(options, name)
        if params is None:  # the same for both
            params = random_params(config, jnp.dtype(options.dtype))
        batch = random_batch(config, options.batch_size, length, 1)
        inputs = jnp.asarray(batch["encoder_input_tokens"])
        shape = arguments(config, options, length)[2]
        encoded = jax.random.normal(jax.random.key(0), shape.shape, shape.dtype)
        for steps in LENGTHS:
            program, given = functools.partial(answer, config, steps), (params, inputs, encoded)
            compiled, call = compiled_call("answer", program, given)
            calls[f"{name}, {steps}"], memory[name] = call, timing.peak_memory(compiled)
    timings = timing.time_interleaved(calls, options.rounds, warm_up=1)
    rows = {}
    for name in CROSS_ATTENTIONS:
        short, long = (np.array(timings[f"{name}, {n}"].seconds) for n in LENGTHS)
        step = (long - short) / (LENGTHS[1] - LENGTHS[0])
        before = short - LENGTHS[0] * step
        rows[name] = {"step_ms": 1e3 * np.median(step), "before_ms": 1e3 * np.median(before)}
        rows[name] |= {"memory_bytes": memory[name]}
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default=DEFAULT_PRESET)
    parser.add_argument("--reduction", type=float, default=3.0)
    parser.add_argument("--input_lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", action="store_true", help="nothing is compiled or timed")
    parser.add_argument("--json", help="file for the report")
    options = parser.parse_args()
    report = {"settings": vars(options), "versions": timing.versions(), "tokens": {}}
    columns = ["tokens in", "attended to", "keys and values"]
    columns += [] if options.shapes else ["memory", "before the first step", "a step"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for length in options.input_lengths:
        rows = {} if options.shapes else timed(options, length)
        for name in CROSS_ATTENTIONS:
            config = config_of(options, name)
            row = rows.setdefault(name, {})
            row["read"] = tokens_read(config, length)
            row["cross_attention_bytes"] = cross_attention_bytes(config, options, length)
            cells = [f"{length:,}", f"{name}: {row['read']:,}"]
            cells += [f"{row['cross_attention_bytes'] / 2**20:.0f} MiB"]
            if not options.shapes:
                cells += [f"{row['memory_bytes'] / 2**20:.0f} MiB"]
                cells += [f"{row['before_ms']:.0f} ms", f"{row['step_ms']:.1f} ms"]
            print(f"| {' | '.join(cells)} |", flush=True)
        report["tokens"][length] = rows
    if options.json:
        files.write_json(options.json, report)


if __name__ == "__main__":
    main()
