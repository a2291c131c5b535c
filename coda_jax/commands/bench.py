"""`coda bench`: what routing saves over the same model with plain parallel adapters.

    coda bench --preset=t5_1_1_base --input_length=512 --batch_size=4 --reductions=3,5,8
    coda bench --preset=pix2struct_base --input_length=4096 --batch_size=1 --reductions=4,8
    coda bench --topology=v5e:2x2 --dtype=bfloat16 --batch_size=32

Times the encoder, whole answers and training steps of the parallel adapter and of CoDA, in turns,
and sets the speed-ups beside what the arithmetic allows: the bound is the ratio of the programs'
floating-point operations. Needs jax and flax only. With a topology it needs libtpu, and no TPU: it
prints what the TPU's compiler expects.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from coda_jax import checkpoints, checks, files, methods, trees
from coda_jax.commands import bench_topology
from coda_jax.commands.bench_programs import (
    BASELINE,
    Programs,
    adapted,
    compared,
    compiled_call,
    operations,
    random_batch,
    random_params,
    with_head,
)
from coda_jax.methods import ATTENTIONS, REDUCTION
from coda_jax.models import DEFAULT_PRESET, ModelConfig, preset
from coda_jax.nn import processors
from coda_jax.profiling import breakdown, timing, topology

MEASURES = ("encoder", "end_to_end", "train_step", "parts")
ROUNDS = 20


def measure(
    dense: ModelConfig,
    dense_params: Mapping,
    *,
    batch_size: int,
    input_length: int,
    target_length: int,
    reductions: Sequence[float],
    attentions: Sequence[str] = ATTENTIONS,
    rounds: int = ROUNDS,
    measures: Sequence[str] = MEASURES,
) -> dict[str, Any]:
    """The report: for each method its sizes, and for each measure times, speed-up and bound.

    Args:
        dense: the model without adapters.
        dense_params: its parameters, in the dtype in which they are kept.
        batch_size: B.
        input_length: N.
        target_length: T, tokens decoded, and target tokens of a training step.
        reductions: r of each CoDA model.
        attentions: of each CoDA model.
        rounds: runs of each program that are counted.
        measures: what to time, of `MEASURES`; of an encoder without a head, those that it has.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("input_length", input_length),
        ("target_length", target_length),
        ("rounds", rounds),
    ):
        checks.COUNT(name, value)
    measures = checks.Each(checks.OneOf(MEASURES))("measures", measures)
    if dense.lacks_head:
        measures = [name for name in measures if name in ("encoder", "parts")]
    batch = random_batch(dense, batch_size, input_length, target_length)
    dense_params = jax.device_put(dense_params)
    batch = jax.device_put(batch)
    programs = {
        name: Programs(config, adapted(config, dense_params), batch)
        for name, config in compared(dense, reductions, attentions).items()
    }
    report: dict[str, Any] = {"methods": {name: _sizes(p) for name, p in programs.items()}}
    counts = operations(batch_size, input_length, target_length)
    for name in measures:
        if name == "parts":
            report[name] = {method: _shares(p) for method, p in programs.items()}
        else:
            report[name] = _compare(programs, name, rounds, counts.get(name))
    return report


def _sizes(program: Programs) -> dict[str, int]:
    trained, _ = methods.partition(program.config, program.params)
    return {
        "parameters": trees.count(program.params),
        "trained_parameters": trees.count(trained),
    }


def _shares(program: Programs) -> dict[str, float]:
    compiled, call = compiled_call("encoder", *program.encoder(), breakdown.COMPILER_OPTIONS)
    return breakdown.shares(compiled, call, breakdown.parts_of(program.config))


def _compare(
    programs: Mapping[str, Programs],
    measure_name: str,
    rounds: int,
    analytic: Callable[[ModelConfig], float] | None,
) -> dict[str, dict[str, Any]]:
    """Times one kind of program of all methods in turns."""
    compiled, calls = {}, {}
    for name, program in programs.items():
        compiled[name], calls[name] = compiled_call(measure_name, *getattr(program, measure_name)())
    timings = timing.time_interleaved(calls, rounds)
    # XLA counts the body of a loop once, that of decoding or of attention: there the count by hand
    # is of use. What is differentiated has no loop.
    by_xla = analytic is None
    rows: dict[str, dict[str, Any]] = {}
    for name, taken in timings.items():
        middle, low, high = timing.speed_up(timings[BASELINE], taken)
        row = {
            "ms": 1e3 * taken.median,
            "speed_up": middle,
            "speed_up_quartiles": [low, high],
            "flops": timing.flops(compiled[name]) if by_xla else None,
            "analytic_flops": analytic(programs[name].config) if analytic else None,
            "peak_memory_bytes": timing.peak_memory(compiled[name]),
        }
        rows[name] = row
        count = "flops" if by_xla else "analytic_flops"
        row["bound"] = rows[BASELINE][count] / row[count]
        row["fraction_of_bound"] = row["speed_up"] / row["bound"]
    return rows


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables for people."""
    settings, found = report["settings"], report["versions"]
    products = ""
    if settings["dtype"] == "bfloat16" and found["platform"] == "cpu":
        products = f" with products of {settings['products']}"
    lines = [
        f"{settings['model']}, {settings['dtype']}{products}, batch {settings['batch_size']}, "
        f"input {settings['input_length']}, target {settings['target_length']}; {found['device']}, "
        f"jax {found['jax']}; medians of {settings['rounds']} rounds taken in turns.",
    ]
    for name in [name for name in MEASURES if name in report and name != "parts"]:
        lines += [
            "",
            f"**{name.replace('_', ' ')}**",
            "",
            "| | time | speed-up (quartiles) | GFLOPs (XLA) | GFLOPs (by hand) | bound "
            "| of the bound | memory |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method, row in report[name].items():
            low, high = row["speed_up_quartiles"]
            lines.append(
                f"| {method} | {row['ms']:.1f} ms | {row['speed_up']:.2f}x ({low:.2f}-{high:.2f}) "
                f"| {_giga(row['flops'])} | {_giga(row['analytic_flops'])} | {row['bound']:.2f} "
                f"| {row['fraction_of_bound']:.2f} | {row['peak_memory_bytes'] / 2**20:.0f} MiB |"
            )
    if "parts" in report:
        names = list(dict.fromkeys(name for row in report["parts"].values() for name in row))
        lines += ["", "**shares of the encoder's time**", ""]
        lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for method, parts in report["parts"].items():
            shares = " | ".join(f"{parts.get(name, 0):.1%}" for name in names)
            lines.append(f"| {method} | {shares} |")
    lines += ["", "| | parameters | trained | share |", "|---|---|---|---|"]
    for method, row in report["methods"].items():
        total, trained = row["parameters"], row["trained_parameters"]
        lines.append(f"| {method} | {total:,} | {trained:,} | {trained / total:.2%} |")
    return "\n".join(lines) + "\n"


def _giga(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f}"


def _flag(check: Callable[[str, Any], Any], read: Callable[[str], Any] = str) -> Callable:
    """The `type` of a flag: its text is read, and checked where it enters."""

    def parse(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            value = text
        try:
            return check("value", value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(entry) for entry in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _known_preset(name: str, value: str) -> str:
    del name
    preset(value)
    return value


def _known_topology(name: str, value: str) -> str:
    del name
    return topology.checked(value)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `coda bench`."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--preset",
        type=_flag(_known_preset),
        default=DEFAULT_PRESET,
        help="a published size; random weights",
    )
    model.add_argument("--checkpoint", help="folder in Hugging Face layout")
    count = {"type": _flag(checks.COUNT, int)}
    parser.add_argument("--input_length", **count, default=512, help="tokens, patches or frames")
    parser.add_argument("--batch_size", **count, default=4)
    parser.add_argument("--target_length", **count, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    reductions = _flag(checks.Each(REDUCTION), _numbers)
    parser.add_argument(
        "--reductions", type=reductions, default="3,5", help="numbers with commas between them"
    )
    attentions = _flag(checks.Each(checks.OneOf(ATTENTIONS)), _words)
    parser.add_argument(
        "--attentions", type=attentions, default=ATTENTIONS, help="with commas, by default both"
    )
    parser.add_argument(
        "--rounds", **count, help=f"timed runs of each program, {ROUNDS} by default"
    )
    every = (*MEASURES, *(set(bench_topology.MEASURES) - set(MEASURES)))
    measures = _flag(checks.Each(checks.OneOf(every)), _words)
    parser.add_argument(
        "--measures",
        type=measures,
        help=f"with commas, of {','.join(MEASURES)}; with --topology of "
        + ",".join(bench_topology.MEASURES),
    )
    parser.add_argument(
        "--topology",
        type=_flag(_known_topology),
        help="TPUs that need not be there, such as v5e:2x2: cycles instead of times",
    )
    parser.add_argument("--json", help="file for the report")


def bench(options: argparse.Namespace) -> None:
    """Measures and prints the tables."""
    if options.topology and options.rounds:
        raise ValueError("--rounds is a number of timed runs, and with --topology none is timed")
    if options.json:
        files.prepare(options.json)
    dtype = jnp.dtype(options.dtype)
    settings = {
        "batch_size": options.batch_size,
        "input_length": options.input_length,
        "target_length": options.target_length,
        "reductions": options.reductions,
        "attentions": options.attentions,
    }
    described = {"model": options.checkpoint or options.preset, "dtype": options.dtype, **settings}
    if options.topology:
        described["topology"] = options.topology
        config = preset(options.preset)
        if options.checkpoint:
            config = with_head(checkpoints.load_hf_config(options.checkpoint))
        report = bench_topology.measure(
            config.replace(dtype=dtype.type, dropout_rate=0.0),
            options.topology,
            measures=options.measures or bench_topology.MEASURES,
            **settings,
        )
    else:
        described["rounds"] = options.rounds or ROUNDS
        # What a CPU multiplies bfloat16 in.
        described["products"] = "bfloat16" if processors.multiplies_bfloat16() else "float32"
        config = preset(options.preset)
        if options.checkpoint:
            config, params = checkpoints.load_hf(options.checkpoint)
            config = with_head(config)
        else:
            params = random_params(config, dtype)
        report = measure(
            config.replace(dtype=dtype.type, dropout_rate=0.0),
            jax.tree.map(lambda x: jnp.asarray(x, dtype), params),
            rounds=described["rounds"],
            measures=options.measures or MEASURES,
            **settings,
        )
    report = {"settings": described, "versions": timing.versions(), **report}
    print((bench_topology.markdown if options.topology else markdown)(report))
    if options.json:
        files.write_json(options.json, report)
