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
import sys
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from coda_jax import checkpoints, checks, files, methods, trees
from coda_jax.commands import bench_topology
from coda_jax.commands.bench_programs import (
    BASELINE,
    LEGEND,
    Programs,
    adapted,
    compared,
    compiled_call,
    operations,
    random_batch,
    random_params,
    with_head,
)
from coda_jax.commands.gin_files import nearest, suggested
from coda_jax.methods import ATTENTIONS, REDUCTION
from coda_jax.models import DEFAULT_PRESET, ModelConfig, preset, presets
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
    show: Callable[[str, Mapping], None] = lambda name, rows: None,
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
        show: called with each part of the report, its name and its rows, when it is there.
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
    show("methods", report["methods"])
    counts = operations(batch_size, input_length, target_length)
    for name in measures:
        if name == "parts":
            each = tqdm(programs.items(), desc="parts", unit="program", leave=False)
            report[name] = {method: _shares(p) for method, p in each}
        else:
            report[name] = _compare(programs, name, rounds, counts.get(name))
        show(name, report[name])
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
    title = measure_name.replace("_", " ")
    for name, program in tqdm(
        programs.items(), desc=f"{title}: compiling", unit="program", leave=False
    ):
        compiled[name], calls[name] = compiled_call(measure_name, *getattr(program, measure_name)())
    timings = timing.time_interleaved(calls, rounds, title=f"{title}: timing")
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


def heading(settings: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """What is measured, and how to read it."""
    products = f" with products of {settings['products']}" if "products" in settings else ""
    rounds = settings["rounds"]
    return (
        f"{settings['model']}, {settings['dtype']}{products}, batch {settings['batch_size']}, "
        f"input {settings['input_length']}, target {settings['target_length']}; "
        f"{versions['device']}, jax {versions['jax']}; "
        f"medians of {rounds} round{'s' * (rounds > 1)} taken in turns.\n\n"
        f"{LEGEND}"
    )


def table(name: str, rows: Mapping[str, Any]) -> str:
    """A part of the report, for people."""
    if name == "methods":
        lines = ["| | parameters | trained | share |", "|---|---|---|---|"]
        for method, row in rows.items():
            total, trained = row["parameters"], row["trained_parameters"]
            lines.append(f"| {method} | {total:,} | {trained:,} | {trained / total:.2%} |")
        return "\n".join(lines)
    if name == "parts":
        parts = list(dict.fromkeys(part for row in rows.values() for part in row))
        lines = ["**shares of the encoder's time**", "", "| | " + " | ".join(parts) + " |"]
        lines.append("|---" * (len(parts) + 1) + "|")
        for method, row in rows.items():
            shares = " | ".join(f"{row.get(part, 0):.1%}" for part in parts)
            lines.append(f"| {method} | {shares} |")
        return "\n".join(lines)
    lines = [
        f"**{name.replace('_', ' ')}**",
        "",
        "| | time | speed-up (quartiles) | GFLOPs | bound | of the bound | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, row in rows.items():
        low, high = row["speed_up_quartiles"]
        spread = f" ({low:.2f}-{high:.2f})" if low < high else ""
        lines.append(
            f"| {method} | {row['ms']:.1f} ms | {row['speed_up']:.2f}x{spread} "
            f"| {(row['flops'] or row['analytic_flops']) / 1e9:.1f} | {row['bound']:.2f} "
            f"| {row['fraction_of_bound']:.2f} | {row['peak_memory_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


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
    try:
        return tuple(float(entry) for entry in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers with commas between them, such as 3,5; got {text!r}"
        ) from None


def _words_of(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """The `type` of a flag that takes some of these words."""

    def parse(text: str) -> tuple[str, ...]:
        words = tuple(text.split(","))
        for word in words:
            if word not in allowed:
                raise argparse.ArgumentTypeError(
                    f"must be of {','.join(allowed)}; got {word!r}"
                    + suggested(nearest(word, allowed))
                )
        return words

    return parse


def _known_preset(name: str, value: str) -> str:
    del name
    preset(value)
    return value


def _known_topology(name: str, value: str) -> str:
    del name
    return topology.checked(value)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `coda bench`."""
    add, count = parser.add_argument, {"type": _flag(checks.COUNT, int)}
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--preset",
        type=_flag(_known_preset),
        default=DEFAULT_PRESET,
        help=f"a published size, with random weights; {DEFAULT_PRESET} by default. "
        f"There are {', '.join(presets())}",
    )
    model.add_argument(
        "--checkpoint",
        help="a folder in Hugging Face's layout, or a name on the Hub, in place of a preset",
    )
    add(
        "--input_length",
        **count,
        default=512,
        help="tokens, patches or frames of a row; 512 by default",
    )
    add("--batch_size", **count, default=4, help="rows; 4 by default")
    add(
        "--target_length",
        **count,
        default=16,
        help="tokens that are decoded, and target tokens of a training step; 16 by default",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation; float32 by default, with --topology bfloat16",
    )
    reductions = _flag(checks.Each(REDUCTION), _numbers)
    add(
        "--reductions",
        type=reductions,
        default="3,5",
        help="r of each CoDA model, which sends one token in r through a layer; 3,5 by default",
    )
    add(
        "--attentions",
        type=_words_of(ATTENTIONS),
        default=ATTENTIONS,
        help=f"of each CoDA model; {','.join(ATTENTIONS)} by default",
    )
    add("--rounds", **count, help=f"timed runs of each program; {ROUNDS} by default")
    every = tuple(dict.fromkeys((*MEASURES, *bench_topology.MEASURES)))
    add(
        "--measures",
        type=_words_of(every),
        help=f"of {','.join(MEASURES)}, or with --topology of {','.join(bench_topology.MEASURES)};"
        " all by default",
    )
    add(
        "--topology",
        type=_flag(_known_topology),
        help="TPUs that need not be there, such as v5e:2x2: cycles instead of times",
    )
    add("--json", help="file for the report, in which each table is as soon as it is printed")


def _measures(options: argparse.Namespace) -> Sequence[str]:
    """What is asked for; ValueError where there is no such thing with or without a topology."""
    allowed = bench_topology.MEASURES if options.topology else MEASURES
    for name in options.measures or ():
        if name not in allowed:
            kind = "with" if options.topology else "without"
            raise ValueError(f"{kind} --topology, --measures are of {','.join(allowed)}: {name!r}")
    return options.measures or allowed


def bench(options: argparse.Namespace) -> None:
    """Measures, and prints each table when it is there."""
    if options.topology and options.rounds:
        raise ValueError("--rounds is a number of timed runs, and with --topology none is timed")
    sizes = {
        "batch_size": options.batch_size,
        "input_length": options.input_length,
        "target_length": options.target_length,
        "reductions": options.reductions,
        "attentions": options.attentions,
    }
    asked = {**sizes, "measures": _measures(options)}
    dtype = jnp.dtype(options.dtype or ("bfloat16" if options.topology else "float32"))
    settings = {"model": options.checkpoint or options.preset, "dtype": dtype.name, **sizes}
    versions = timing.versions()
    if options.topology:
        settings["topology"] = options.topology
        versions |= {"device": options.topology, "platform": "tpu"}
    else:
        asked["rounds"] = settings["rounds"] = options.rounds or ROUNDS
        if dtype == jnp.bfloat16 and versions["platform"] == "cpu":
            settings["products"] = "bfloat16" if processors.multiplies_bfloat16() else "float32"
    config, params = _model(options, dtype)
    if options.json:
        files.prepare(options.json)
    report = {"settings": settings, "versions": versions}
    of_tables = bench_topology.table if options.topology else table
    of_heading = bench_topology.heading if options.topology else heading
    print(of_heading(settings, versions), flush=True)

    def show(name: str, rows: Mapping[str, Any]) -> None:
        report[name] = rows
        print(f"\n{of_tables(name, rows)}", flush=True)
        if options.json:
            files.write_json(options.json, report)

    if options.topology:
        bench_topology.measure(config, options.topology, show=show, **asked)
    else:
        measure(config, params, show=show, **asked)
    if options.json:
        print(f"The report is in {options.json}", file=sys.stderr)


def _model(options: argparse.Namespace, dtype: jnp.dtype) -> tuple[ModelConfig, Mapping | None]:
    """The dense model and its parameters, of which a topology needs none."""
    params = None
    if not options.checkpoint:
        config = preset(options.preset)
        params = None if options.topology else random_params(config, dtype)
    elif options.topology:
        config = with_head(checkpoints.load_hf_config(options.checkpoint))
    else:
        config, params = checkpoints.load_hf(options.checkpoint)
        config = with_head(config)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    return config.replace(dtype=dtype.type, dropout_rate=0.0), params
