"""Answers of batches in which each row has its own adapter, beside those with one adapter for all.

    python benchmarks/many_adapters.py --counts 1 10 100

Random weights and inputs in full rows, and no end token: all answers have their length. The rows of
a batch have the adapters in turn. A ratio is the throughput as a share of that of a model with one
adapter, the median over the rounds with its quartiles.
"""

import argparse
import functools

import jax
import numpy as np

from coda_jax import files, methods, trees
from coda_jax.commands.bench_programs import random_params
from coda_jax.inference import Decoding, Predictor
from coda_jax.methods import Coda, Lora, ParallelAdapter
from coda_jax.models import family_of, preset
from coda_jax.profiling import timing

METHODS = {"coda": (Coda(3.0), ParallelAdapter()), "lora": (Lora(),)}


def calls(options: argparse.Namespace) -> dict:
    """{"alone" or a number of adapters: the answers to the same inputs}."""
    config = preset(options.preset, dropout_rate=0.0, eos_id=-1, methods=METHODS[options.methods])
    params = random_params(config, np.float32)
    decoding = Decoding(
        max_input_length=options.input_length,
        max_decode_length=options.output_length,
        batch_size=options.batch_size,
    )
    rng = np.random.default_rng(0)
    sizes = options.batch_size * options.batches, options.input_length
    inputs = [*family_of(config).inputs.random(config, rng, *sizes)]
    own, frozen = methods.partition(config, params)

    def adapter(number):
        moved = jax.tree.map(lambda x: x * (1 + 0.01 * number), own)
        return config, trees.merge(frozen, moved)

    def answer(predictor, **names):
        return [tokens for _, tokens in predictor(inputs, **names)]

    found = {"alone": functools.partial(answer, Predictor(config, params, decoding))}
    for count in options.counts:
        adapters = {str(number): adapter(number) for number in range(count)}
        predictor = Predictor(config.dense(), params, decoding, adapters=adapters)
        names = [str(row % count) for row in range(len(inputs))]
        found[str(count)] = functools.partial(answer, predictor, adapters=names)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default="t5_1_1_base")
    parser.add_argument("--methods", default="coda", choices=METHODS)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100], help="of adapters")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=1, help="of a call")
    parser.add_argument("--input_length", type=int, default=512)
    parser.add_argument("--output_length", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for the report")
    options = parser.parse_args()
    timings = timing.time_interleaved(calls(options), options.rounds, warm_up=1)
    report = {"versions": timing.versions(), **vars(options), "ms": {}, "ratios": {}}
    print("| adapters | time | throughput |\n|---|---|---|")
    for name, taken in timings.items():
        ratio = timing.speed_up(timings["alone"], taken)
        report["ms"][name] = 1e3 * taken.median
        report["ratios"][name] = ratio
        middle, low, high = ratio
        print(f"| {name} | {1e3 * taken.median:.0f} ms | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    if options.json:
        files.write_json(options.json, report)


if __name__ == "__main__":
    main()
