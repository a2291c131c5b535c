"""`coda check` with a TOPOLOGY: what a chip of a pod holds, computes and sends.

By the TPU's own compiler, which needs no TPU. Rows of the batch are divided along "data" of the
mesh, parameters along "model", as T5X does by default: see `sharding.AXIS_RULES`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from coda_jax import checks
from coda_jax.commands.bench_programs import Programs, random_batch, served_shapes
from coda_jax.commands.bench_topology import MEASURES
from coda_jax.models import ModelConfig, check_divides, param_axes
from coda_jax.nn.remat import POLICIES
from coda_jax.profiling import breakdown, topology, tpu
from coda_jax.sharding import Placement, checked_mesh

_ROWS = 8  # for each chip along "data"
_HELD_WHOLE = "held_whole_bytes"
_REMEDY = (
    "What does not fit needs a smaller BATCH_SIZE, or more chips along 'model' of the MESH; a "
    "training step also ACCUMULATION or REMAT_POLICY."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compiled for what; checked.

    Attributes:
        topology: name, such as "v5e:4x4".
        mesh: {"data", "model"}: chips along each axis.
        batch_size: B.
        dtype: of the computation.
        accumulation: parts of a training step's batch.
        remat_policy: what a training step computes again, see `ModelConfig`; None for the
            config's own.
    """

    topology: str
    mesh: dict[str, int]
    batch_size: int
    dtype: Any
    accumulation: int
    remat_policy: str | None


def settings(
    name: str | None = None,
    mesh: Mapping[str, int] | None = None,
    batch_size: int | None = None,
    dtype: Any = None,
    accumulation: int | None = None,
    remat_policy: str | None = None,
) -> Settings | None:
    """Checks what is asked for; None where no topology is.

    Args:
        name: of TPUs, such as "v5e:4x4".
        mesh: {"data", "model"}: their chips along each axis; None for all along "data".
        batch_size: rows on all chips; None for 8 for each chip along "data".
        dtype: of computation and frozen parameters; None for bfloat16.
        accumulation: parts of a training step's batch; None for 1.
        remat_policy: what a training step computes again; None for what the config says.

    Raises:
        ValueError: there is no such topology; the mesh is not of its chips; rows do not divide.
        ModuleNotFoundError: there is no libtpu.
    """
    if name is None:
        given = {"MESH": mesh, "BATCH_SIZE": batch_size, "DTYPE": dtype}
        given |= {"ACCUMULATION": accumulation, "REMAT_POLICY": remat_policy}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{option}={value!r} has no effect without TOPOLOGY")
        return None
    chips = topology.chips(checks.text("TOPOLOGY", name), whole=True)
    mesh = checked_mesh("MESH", mesh, len(chips))
    rows = _ROWS * mesh["data"] if batch_size is None else checks.COUNT("BATCH_SIZE", batch_size)
    accumulation = checks.COUNT("ACCUMULATION", 1 if accumulation is None else accumulation)
    if rows % (mesh["data"] * accumulation):
        parts = f" x ACCUMULATION={accumulation}" * (accumulation > 1)
        raise ValueError(
            f"BATCH_SIZE must be a multiple of {mesh['data']} chips along 'data'{parts}, got {rows}"
        )
    dtype = checks.dtype("DTYPE", "bfloat16" if dtype is None else dtype)
    policy = checks.Maybe(checks.OneOf([*POLICIES]))("REMAT_POLICY", remat_policy)
    return Settings(name, mesh, rows, dtype, accumulation, policy)


def check_mesh(config: ModelConfig, given: Settings | None) -> None:
    """Raises ValueError where the mesh does not divide the model."""
    if given is not None:
        check_divides(config, _pod(given))


def _pod(given: Settings) -> Placement:
    return Placement(given.mesh, topology.chips(given.topology, whole=True))


def measure(config: ModelConfig, given: Settings, inputs: int, targets: int) -> dict[str, Any]:
    """The report: what is compiled, and for each program what `Program.report` says of a chip.

    A program that does not fit and that the compiler refuses has "fits" and "refused" alone. The
    training step is that of Adam on what the methods train.

    Args:
        config: the model, with its methods.
        given: what to compile for.
        inputs: N.
        targets: T, tokens decoded, and target tokens of a training step.
    """
    policy = given.remat_policy or config.remat_policy
    config = config.replace(dtype=given.dtype, remat_policy=policy, dropout_rate=0.0)
    pod = _pod(given)
    batch = random_batch(config, given.batch_size, inputs, targets)
    programs, axes = Programs(config, served_shapes(config), batch), param_axes(config)
    whole = pod.shapes(programs.params, axes)
    report = {
        "name": given.topology,
        "mesh": given.mesh,
        "batch_size": given.batch_size,
        "inputs": inputs,
        "targets": targets,
        "dtype": jax.numpy.dtype(given.dtype).name,
        "memory_bytes": tpu.CHIPS[given.topology.split(":")[0]].memory,
        _HELD_WHOLE: sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(whole)
            if leaf.sharding.is_fully_replicated
        ),
        "programs": {},
    }
    for name in _measures(config):
        of_step = {"accumulation": given.accumulation} if name == "train_step" else {}
        function, arguments = getattr(programs, name)(**of_step)
        *held, batch = arguments
        shapes = (*pod.shapes(held, axes), pod.rows(batch))
        report["programs"][name] = _row(config, given, function, shapes, pod)
    return report


def _measures(config: ModelConfig) -> list[str]:
    """What a model does: without a head it only encodes, without methods it does not train."""
    names = MEASURES[:1] if config.lacks_head else MEASURES
    return [name for name in names if config.methods or name != "train_step"]


def _row(config, given, function, arguments, pod) -> dict[str, Any]:
    try:
        program = topology.compile_for(given.topology, function, arguments, pod)
    except topology.TooLargeError as error:
        return {"fits": False, "refused": str(error)}
    parts = breakdown.parts_of(config)
    return {**program.report(parts), "collectives": program.collectives(parts)}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    lines = [
        "",
        f"One of the chips of {report['name']}, {mesh}, by the TPU compiler's estimates; "
        f"{report['dtype']}, batch {report['batch_size']}, input {report['inputs']}, target "
        f"{report['targets']}.",
        f"Of its parameters {report[_HELD_WHOLE] / 2**20:,.1f} MiB are whole on every chip.",
        "",
        "| | arguments | temporary | fits | million cycles | guessed | compiled in | collectives |",
        "|---" * 8 + "|",
    ]
    for name, row in report["programs"].items():
        lines.append(f"| {name.replace('_', ' ')} | {_cells(row, report['memory_bytes'])} |")
    loops = [
        f"- {name.replace('_', ' ')}: {loop} is of unknown length and counts "
        f"{tpu.rounds_of(loop)} times"
        for name, row in report["programs"].items()
        for loop in row.get("unknown_loops", ())
    ]
    lines += ["", *loops] if loops else []
    if not all(row["fits"] for row in report["programs"].values()):
        lines += ["", _REMEDY]
    sent = [
        f"| {name.replace('_', ' ')} | {sent['kind']} | {sent['part']} | {sent['count']} "
        f"| {sent['bytes'] / 2**20:,.2f} |"
        for name, row in report["programs"].items()
        for sent in row.get("collectives", ())
    ]
    if sent:
        lines += ["", "| collectives | kind | of | number | MiB |", "|---" * 5 + "|", *sent]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any], memory: float) -> str:
    if "refused" in row:
        return f" | | NO: {row['refused']} | | | | "
    number = sum(sent["count"] for sent in row["collectives"])
    size = sum(sent["bytes"] for sent in row["collectives"])
    return (
        f"{row['argument_bytes'] / 2**20:,.0f} MiB | {row['temporary_bytes'] / 2**20:,.0f} MiB "
        f"| {'yes' if row['fits'] else 'NO'}, {memory / 1e9:.0f} GB "
        f"| {row['cycles'] / 1e6:,.2f} | {row['guessed']:.0%} | {row['compile_seconds']:.0f} s "
        f"| {number}, {size / 2**20:,.1f} MiB"
    )
