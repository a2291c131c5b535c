"""`coda bench --topology=v5e:2x2`: the same comparison on TPUs that are not there, in cycles."""

from collections.abc import Callable, Mapping, Sequence
import importlib
from typing import Any

from tqdm import tqdm

from coda_jax import checks, methods
from coda_jax.commands.bench_programs import (
    BASELINE,
    LEGEND,
    Programs,
    compared,
    operations,
    random_batch,
    served_shapes,
)
from coda_jax.methods import comparisons
from coda_jax.models import ModelConfig
from coda_jax.profiling import breakdown, flops, topology, tpu

MEASURES = ("encoder", "end_to_end", "beams", "train_step")  # of `Programs`
# XLA counts all operations of a step, CoDA's own among them, and one round of a decoding loop.
_BY_XLA = "train_step"
_OF_PEERS = ("encoder", "train_step")  # decoding is no matter of their networks
_BEAMS = {"end_to_end": 1, "beams": 4}


def measure(
    dense: ModelConfig,
    name: str,
    *,
    batch_size: int,
    input_length: int,
    target_length: int,
    reductions: Sequence[float],
    measures: Sequence[str] = MEASURES,
    attentions: Sequence[str] = methods.ATTENTIONS,
    show: Callable[[str, Mapping], None] = lambda name, rows: None,
) -> dict[str, Any]:
    """The report: for each measure what each method's program costs on one chip.

    A program that the compiler refuses, since it does not fit, has "fits" and "refused" alone.

    Args:
        dense: the model without adapters.
        name: of the topology.
        batch_size: B.
        input_length: N.
        target_length: T, tokens decoded, and target tokens of a training step.
        reductions: r of each CoDA model.
        attentions: of each CoDA model.
        measures: of `MEASURES`; of an encoder without a head, only that.
        show: called with each part of the report, its name and its rows, when it is there.
    """
    measures = checks.Each(checks.OneOf(MEASURES))("measures", measures)
    if dense.lacks_head:
        measures = [measure for measure in measures if measure == "encoder"]
    batch = random_batch(dense, batch_size, input_length, target_length)
    programs = {
        method: Programs(config, served_shapes(config), batch)
        for method, config in compared(dense, reductions, attentions).items()
    }
    peers = _peers(dense, batch)
    sizes = batch_size, input_length, target_length
    report: dict[str, Any] = {}
    for measure_name in measures:
        compared_here = programs | (peers if measure_name in _OF_PEERS else {})
        compiled = {
            method: _compiled(name, *getattr(p, measure_name)())
            for method, p in tqdm(
                compared_here.items(),
                desc=f"{measure_name.replace('_', ' ')}: compiling",
                unit="program",
                leave=False,
            )
        }
        configs = {method: p.config for method, p in compared_here.items()}
        report[measure_name] = _rows(name, measure_name, configs, compiled, sizes)
        show(measure_name, report[measure_name])
    return report


def _rows(
    name: str,
    measure_name: str,
    configs: Mapping[str, ModelConfig],
    compiled: Mapping[str, topology.Program | str],
    sizes: tuple[int, int, int],
) -> dict[str, dict[str, Any]]:
    """What is said of each method's program; sizes are B, N and T."""
    counted = operations(*sizes).get(measure_name)
    baseline = compiled[BASELINE]
    baseline = baseline if isinstance(baseline, topology.Program) else None
    rows = {}
    for method, program in compiled.items():
        if not isinstance(program, topology.Program):
            rows[method] = {"fits": False, "refused": program}
            continue
        config, bound = configs[method], None
        if counted:
            bound = counted(configs[BASELINE]) / counted(config)
        elif measure_name == _BY_XLA and baseline:
            bound = baseline.flops / program.flops
        row = rows[method] = topology.row(program, baseline, bound, breakdown.parts_of(config))
        row["ms"] = 1e3 * program.cost.total / topology.chip(name).clock
        if measure_name in _BEAMS and program.cost.loops:
            read = flops.step_bytes(config, *sizes, _BEAMS[measure_name])
            row["step"] = _step(program, name, read)
    return rows


def _compiled(name, function, arguments) -> topology.Program | str:
    """The program, or why there is none."""
    try:
        return topology.compile_for(name, function, arguments)
    except topology.TooLargeError as error:
        return str(error)


def _peers(dense: ModelConfig, batch: Mapping) -> dict[str, Programs]:
    """The dense model in T5X's own network, all of it trained, where T5X is present."""
    try:
        # By name: this module stands above the commands.
        t5x_models = importlib.import_module("coda_jax.t5x_models")
    except ImportError:
        return {}
    network = t5x_models.example_network(dense)
    if network is None:
        return {}
    config = dense.replace(methods=comparisons.everything())
    return {"T5X": Programs(config, served_shapes(config), batch, network)}


def _step(program: topology.Program, name: str, read: int) -> dict[str, float]:
    """What a decoding step costs, the dearest loop's round, and what reading its bytes would."""
    return {
        "cycles": max(program.cost.loops.values()),
        "bytes": read,
        "bytes_cycles": read / topology.chip(name).bytes_a_cycle,
    }


def heading(settings: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """What is measured, and how to read it."""
    return (
        f"{settings['model']}, {settings['dtype']}, batch {settings['batch_size']}, input "
        f"{settings['input_length']}, target {settings['target_length']}; one chip of "
        f"{settings['topology']}, by the TPU compiler's estimates; jax {versions['jax']}.\n\n"
        f"{LEGEND} Guessed is the share of the cycles of which the compiler says nothing."
    )


def table(name: str, rows: Mapping[str, Any]) -> str:
    """A part of the report, for people."""
    lines = [
        f"**{name.replace('_', ' ')}**",
        "",
        "| | million cycles | speed-up | bound | of the bound | guessed | ms "
        "| lowered, compiled in | arguments | temporary | fits |",
        "|---" * 11 + "|",
    ]
    lines += [f"| {method} | {_cells(row)} |" for method, row in rows.items()]
    if not all(row["fits"] for row in rows.values()):
        lines += ["", "What does not fit needs a smaller --batch_size or --input_length."]
    compiled = {method: row for method, row in rows.items() if "parts" in row}
    lines += _loops(compiled)
    parts = list(dict.fromkeys(part for row in compiled.values() for part in row["parts"]))
    if parts:
        lines += ["", "| share of the cycles | " + " | ".join(parts) + " |"]
        lines += ["|---" * (len(parts) + 1) + "|"]
    for method, row in compiled.items():
        shares = " | ".join(f"{row['parts'].get(part, 0):.1%}" for part in parts)
        lines.append(f"| {method} | {shares} |")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> str:
    if "refused" in row:
        return "| " * 9 + f"NO: {row['refused']}"
    speed_up = f"{row['speed_up']:.2f}x" if row["speed_up"] else ""
    return (
        f"{row['cycles'] / 1e6:.2f} | {speed_up} "
        f"| {_ratio(row['bound'])} | {_ratio(row['fraction_of_bound'])} "
        f"| {row['guessed']:.0%} | {row['ms']:.2f} "
        f"| {row['lower_seconds']:.0f}, {row['compile_seconds']:.0f} s "
        f"| {row['argument_bytes'] / 2**20:.0f} MiB "
        f"| {row['temporary_bytes'] / 2**20:.0f} MiB | {'yes' if row['fits'] else 'NO'}"
    )


def _loops(rows: Mapping[str, Any]) -> list[str]:
    """What is said of loops whose length is not in the program."""
    lines = [
        f"{method}: {loop} is of unknown length and counts {tpu.rounds_of(loop)} times"
        for method, row in rows.items()
        for loop in row["unknown_loops"]
    ]
    lines += [
        f"{method}: a decoding step takes {row['step']['cycles'] / 1e6:.2f} million cycles, where "
        f"reading {row['step']['bytes'] / 2**20:.0f} MiB of weights, keys and values takes "
        f"{row['step']['bytes_cycles'] / 1e6:.2f}"
        for method, row in rows.items()
        if "step" in row
    ]
    return ["", *(f"- {line}" for line in lines)] if lines else []


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
