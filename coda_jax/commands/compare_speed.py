"""What the models of `coda compare` cost: time and memory here, cycles on a TPU's chip.

Programs run on random inputs that fill their rows, and answers go on to their last place: what a
model says does not change its time.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from coda_jax import checks, methods, trees
from coda_jax.commands.bench_programs import (
    BASELINE,
    Programs,
    compiled_call,
    random_batch,
    served_shapes,
)
from coda_jax.commands.loading import LoadedModel
from coda_jax.methods import comparisons
from coda_jax.nn.quantized import quantization_of
from coda_jax.profiling import flops, timing

DENSE = "dense model"  # the name of the first reference
_ANSWERING, _TRAINING = ("encoder", "end_to_end"), ("train_step",)


@dataclasses.dataclass(frozen=True)
class Timed:
    """What is timed.

    Attributes:
        batches: (rows, inputs) of each, the most telling first; () for none.
        answer_length: tokens of an answer, and of a target in training.
        rounds: runs of each program that are counted.
        topology: whose chip's cycles are counted, such as "v5e:2x2"; None for no such count.
    """

    batches: tuple[tuple[int, int], ...] = ()
    answer_length: int = 16
    rounds: int = 15
    topology: str | None = None

    def __post_init__(self):
        checks.fields(
            self,
            batches=checks.Each(checks.Each(checks.COUNT)),
            answer_length=checks.COUNT,
            rounds=checks.COUNT,
            topology=checks.Maybe(checks.text),
        )
        for place, found in enumerate(self.batches):
            if len(found) != 2:
                raise checks.wrong(f"Timed.batches[{place}]", "(rows, inputs)", found)
        if self.topology is not None:
            from coda_jax.profiling import topology  # Here: it asks for libtpu.

            topology.chip(self.topology)

    def add_answering(self, report: dict[str, Any], models: Mapping[str, LoadedModel]) -> None:
        """Adds what each model's answers cost to a report's "recipes" and to its "dense"."""
        everything = {DENSE: dense_of([*models.values()]), **models}
        rows = {DENSE: report["dense"], **report["recipes"]}
        for sizes in self.batches:
            operations = {x: flops.encoder_flops(m.config, *sizes) for x, m in everything.items()}
            for name, figures in self._measured(everything, _ANSWERING, sizes).items():
                figures["flops_ratio"] = operations[DENSE] / operations[name]
                rows[name].setdefault("speed", {})[_named(sizes)] = figures
        if self.topology is not None and self.batches:
            for name, figures in self._on_chip(everything, self.batches[0]).items():
                rows[name]["tpu"] = {self.topology: figures}

    def add_training(self, report: dict[str, Any], models: Mapping[str, LoadedModel]) -> None:
        """Adds what a step of each model's training costs to a report's "recipes"."""
        for sizes in self.batches:
            for name, figures in self._measured(models, _TRAINING, sizes).items():
                report["recipes"][name]["speed"][_named(sizes)] |= figures

    def _measured(
        self, models: Mapping[str, LoadedModel], measures: Sequence[str], sizes: tuple[int, int]
    ) -> dict[str, dict[str, Any]]:
        """What programs of `bench_programs` cost, timed in turns.

        Returns:
            {name: {"encoder_ms", "encoder_bytes", "encoder_speed_up": {reference: [median, lower
            and upper quartile]}, ... of each measure}}.
        """
        report: dict[str, dict[str, Any]] = {name: {} for name in models}
        for what in measures:
            calls = {}
            for name, model in models.items():
                batch = random_batch(model.config, *sizes, self.answer_length)
                on_device = jax.device_put((model.params, batch))
                programs = Programs(model.config, *on_device)
                compiled, calls[name] = compiled_call(what, *getattr(programs, what)())
                report[name][f"{what}_bytes"] = timing.peak_memory(compiled)
            times = timing.time_interleaved(calls, self.rounds, title=what.replace("_", " "))
            for name, taken in times.items():
                report[name][f"{what}_ms"] = 1e3 * taken.median
                report[name][f"{what}_speed_up"] = {
                    called: list(timing.speed_up(times[other], taken))
                    for other, called in _references(models).items()
                }
        return report

    def _on_chip(
        self, models: Mapping[str, LoadedModel], sizes: tuple[int, int]
    ) -> dict[str, dict[str, float]]:
        """{name: cycles of its encoder on one chip, by the TPU's compiler, and the speed-up}."""
        from coda_jax.profiling import topology  # Here: it asks for libtpu.

        cycles = {}
        for name, model in models.items():
            config = model.config.replace(dtype=jnp.bfloat16)
            programs = Programs(config, served_shapes(config), random_batch(config, *sizes, 1))
            program = topology.compile_for(self.topology, *programs.encoder())
            cycles[name] = program.cost.total
        return {
            name: {"encoder_cycles": found, "encoder_speed_up": cycles[DENSE] / found}
            for name, found in cycles.items()
        }


def dense_of(models: Sequence[LoadedModel]) -> LoadedModel:
    """The dense model under the first that is in float32 without int8, or else under the first."""
    exact = (
        model
        for model in models
        if model.config.dtype == jnp.float32 and quantization_of(model.params) is None
    )
    model = next(exact, models[0])
    _, base = trees.split(model.params, methods.created(model.config))
    return LoadedModel(model.config.dense(), base, model.directory)


def _references(models: Mapping[str, LoadedModel]) -> dict[str, str]:
    """{name of a model: what it is called as a reference}: the dense one, the baseline."""
    baseline = [type(method) for method in comparisons.baseline()]
    found = {DENSE: DENSE} if DENSE in models else {}
    for name, model in models.items():
        if [type(method) for method in model.config.methods] == baseline:
            return found | {name: BASELINE}
    return found


def _named(sizes: tuple[int, int]) -> str:
    return "x".join(map(str, sizes))
