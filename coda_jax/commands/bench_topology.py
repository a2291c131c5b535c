"""`coda bench --topology=v5e:2x2`: the same comparison on TPUs that are not there, in cycles."""

from collections.abc import Mapping, Sequence
import importlib
from typing import Any

from coda_jax import checks, methods
from coda_jax.commands.bench_programs import (
    BASELINE,
    Programs,
    compared,
    operations,
    random_batch,
    served_shapes,
)
from coda_jax.methods import comparisons
from coda_jax.models import ModelConfig
from coda_jax.profiling import breakdown, flops, topology

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
) -> dict[str, Any]:
    """The report: for each measure what each method's program costs on one chip.

    Args:
        dense: the model without adapters.
        name: of the topology.
        batch_size: B.
        input_length: N.
        target_length: T, tokens decoded, and target tokens of a training step.
        reductions: r of each CoDA model.
        attentions: of each CoDA model.
        measures: of `MEASURES`; of an encoder without a head, only that.
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
    report: dict[str, Any] = {}
    for measure_name in measures:
        compared_here = programs | (peers if measure_name in _OF_PEERS else {})
        compiled = {
            method: topology.compile_for(name, *getattr(p, measure_name)(), rounds=target_length)
            for method, p in compared_here.items()
        }
        counted = operations(batch_size, input_length, target_length).get(
            measure_name, lambda config: None
        )
        baseline = compiled[BASELINE]
        report[measure_name] = {}
        for method, program in compiled.items():
            config = compared_here[method].config
            asked, of_baseline = counted(config), counted(programs[BASELINE].config)
            bound = of_baseline / asked if asked else None
            if measure_name == _BY_XLA:
                bound = baseline.flops / program.flops
            row = topology.row(program, baseline, bound, breakdown.parts_of(config))
            report[measure_name][method] = row
            if measure_name in _BEAMS and program.cost.loops:
                sizes = batch_size, input_length, target_length, _BEAMS[measure_name]
                row["step"] = _step(program, name, flops.step_bytes(config, *sizes))
    return report


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


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables for people."""
    settings = report["settings"]
    lines = [
        f"{settings['model']}, {settings['dtype']}, batch {settings['batch_size']}, input "
        f"{settings['input_length']}, target {settings['target_length']}; one chip of "
        f"{settings['topology']}, by the TPU compiler's estimates.",
    ]
    for name in [name for name in MEASURES if name in report]:
        rows = report[name]
        lines += [
            "",
            f"**{name.replace('_', ' ')}**",
            "",
            "| | million cycles | speed-up | bound | of the bound | guessed | lowered, compiled in "
            "| arguments | temporary | fits |",
            "|---" * 10 + "|",
        ]
        lines += [
            f"| {method} | {row['cycles'] / 1e6:.2f} | {row['speed_up']:.2f}x "
            f"| {_ratio(row['bound'])} | {_ratio(row['fraction_of_bound'])} "
            f"| {row['guessed']:.0%} | {row['lower_seconds']:.0f}, {row['compile_seconds']:.0f} s "
            f"| {row['argument_bytes'] / 2**20:.0f} MiB "
            f"| {row['temporary_bytes'] / 2**20:.0f} MiB | {'yes' if row['fits'] else 'NO'} |"
            for method, row in rows.items()
        ]
        lines += _loops(rows, settings["target_length"])
        parts = list(dict.fromkeys(part for row in rows.values() for part in row["parts"]))
        lines += ["", "| share of the cycles | " + " | ".join(parts) + " |"]
        lines += ["|---" * (len(parts) + 1) + "|"]
        for method, row in rows.items():
            shares = " | ".join(f"{row['parts'].get(part, 0):.1%}" for part in parts)
            lines.append(f"| {method} | {shares} |")
    return "\n".join(lines) + "\n"


def _loops(rows: Mapping[str, Any], rounds: int) -> list[str]:
    """What is said of loops whose length is not in the program."""
    lines = [
        f"{method}: {loop} is of unknown length and counts {rounds} times"
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
