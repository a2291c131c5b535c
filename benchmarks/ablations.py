"""What closes the gap between CoDA and the parallel adapter: variants of the demos' adaptations.

    python -m benchmarks.ablations speech --seeds=0,1,2 --json=benchmarks/results/ablations.json

adapts the bundled checkpoints of a demo ("text", "images" or "speech") once for each variant and
seed, with the demo's data and steps, and scores the answers to the test split. The seed is that of
the data's order, of fresh leaves and of dropout. What is in the JSON file is not computed again.
`--table` prints the table of it: means, and standard errors over seeds. `--picture=FILE.png` draws
the demo's score over the encoder's operations, of the elastic adapter and of adapters for one r.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import statistics
import tempfile
from typing import Any

import matplotlib.pyplot as plt
import optax

from benchmarks.adaptations import ADAPTATIONS, WARM_UP_STEPS, Adaptation
from coda_jax import files
from coda_jax.commands.loading import LoadedModel, load_model
from coda_jax.commands.train import Distill, train
from coda_jax.methods import Coda, unrouted, with_reduction
from coda_jax.profiling import flops
from coda_jax.training.schedules import warmup_cosine
from coda_jax.training.trainer import TrainOptions

TEACHER = "at r = 1"  # the variant whose adapter teaches


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to adapt.

    Attributes:
        name: in the table.
        reduction: r; None for the parallel adapter.
        pretrained: whether the base has had conditional pretraining.
        coda: values of other fields of `Coda`.
        options: values of fields of `TrainOptions`.
        distill: the weight of the teacher, and its temperature; None for no teacher.
        own_adapter: whether the teacher has an adapter of its own, that of `TEACHER`.
        rate: the peak learning rate as a multiple of the demo's.
        scored: reductions at which the answers are scored; () for the trained one.
        steps: as a multiple of the demo's.
    """

    name: str
    reduction: float | None
    pretrained: bool = True
    coda: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    distill: tuple[float, float] | None = None
    own_adapter: bool = True
    rate: float = 1.0
    scored: tuple[float, ...] = ()
    steps: float = 1.0


def variants(demo: Adaptation) -> dict[str, Variant]:
    """All variants by name, the parallel adapter first."""
    r = demo.reductions[-1]
    layers = load_model(str(demo.dense)).config.num_encoder_layers
    ends = (1.0, *[float(r)] * (layers - 2), 1.0)
    speeds = (2, 3, 4, 5, 8)
    found = [
        Variant("parallel adapter, dense base", None, pretrained=False),
        Variant(TEACHER, 1),
        Variant("CoDA, dense base", r, pretrained=False),
        Variant("CoDA", r),
        Variant("CoDA, smaller r", demo.reductions[0]),
        Variant("teacher with adapter, w 0.5", r, distill=(0.5, 1.0)),
        Variant("teacher with adapter, w 0.9", r, distill=(0.9, 1.0)),
        Variant("teacher with adapter, w 0.9, T 2", r, distill=(0.9, 2.0)),
        Variant("teacher with adapter, w 1, no labels", r, distill=(1.0, 1.0)),
        Variant("teacher without adapter, w 0.5", r, distill=(0.5, 1.0), own_adapter=False),
        Variant("straight-through", r, coda={"routing": "straight_through"}),
        Variant(
            "straight-through, r from 1",
            r,
            coda={"routing": "straight_through"},
            options={"reduction_start": 1.0},
        ),
        Variant("epsilon 0.02", r, coda={"epsilon": 0.02}),
        Variant("epsilon 0.2", r, coda={"epsilon": 0.2}),
        Variant("epsilon 4 to 1", r, options={"epsilon_start": 4.0}),
        Variant("noise 0.5", r, coda={"noise": 0.5}),
        Variant("first and last layer dense", r, coda={"reduction": ends}),
        Variant("k-to-all", r, coda={"attention": "k_to_all"}),
        Variant("r from 1", r, options={"reduction_start": 1.0}),
        Variant("teacher with adapter, w 0.1", r, distill=(0.1, 1.0)),
        Variant("twice the steps", r, steps=2.0),
        Variant("twice the rate", r, rate=2.0),
        Variant("half the rate", r, rate=0.5),
        Variant("elastic with r = 1", r, options={"reductions": (1, *demo.reductions)}),
        Variant("elastic", r, options={"reductions": speeds}, scored=speeds),
        Variant(
            "elastic, teacher with adapter, w 0.5",
            r,
            options={"reductions": speeds},
            distill=(0.5, 1.0),
            scored=speeds,
        ),
        *(Variant(f"r = {r} alone", r) for r in speeds),
    ]
    return {variant.name: variant for variant in found}


def start(demo: Adaptation, variant: Variant, seed: int) -> LoadedModel:
    """The model before its adaptation."""
    pretrained = load_model(
        str(demo.coda), adapter_checkpoint=str(demo.coda / "adapter"), seed=seed
    )
    methods = pretrained.config.methods
    if variant.reduction is None:
        methods = unrouted(methods)
    else:
        methods = tuple(
            dataclasses.replace(method, **{"reduction": variant.reduction, **variant.coda})
            if isinstance(method, Coda)
            else method
            for method in methods
        )
    if not variant.pretrained:
        return load_model(str(demo.dense), methods=methods, seed=seed)
    return dataclasses.replace(pretrained, config=pretrained.config.replace(methods=methods))


def adapted(
    demo: Adaptation,
    variant: Variant,
    seed: int,
    folder: pathlib.Path,
    teacher: pathlib.Path | None,
) -> LoadedModel:
    """The model after its adaptation; `teacher` is the folder of an adapter."""
    rate = demo.learning_rate if variant.reduction is None else demo.coda_learning_rate
    steps = round(demo.steps * variant.steps)
    distill = None
    if variant.distill is not None:
        path = str(teacher) if variant.own_adapter else None
        distill = Distill(*variant.distill, adapter=path)
    result, _ = train(
        str(folder),
        start(demo, variant, seed),
        data=dataclasses.replace(demo.train_data, seed=seed),
        options=TrainOptions(steps, save_every=steps, seed=seed, **variant.options),
        optimizer=optax.adam,
        learning_rate=warmup_cosine(rate * variant.rate, steps, WARM_UP_STEPS),
        distill=distill,
    )
    return result


def scores(demo: Adaptation, variant: Variant, model: LoadedModel) -> dict[str, float]:
    """{r: the demo's metric}, at the trained reduction, or at each of those to score."""
    if not variant.scored:
        return {str(variant.reduction): demo.score(model)}
    found = {}
    for r in variant.scored:
        methods = with_reduction(model.config.methods, r)
        routed = dataclasses.replace(model, config=model.config.replace(methods=methods))
        found[str(r)] = demo.score(routed)
    return found


def over_seeds(by_seed: dict[str, dict[str, float]], r: str) -> tuple[float, float]:
    """Mean and standard error of the scores at r; 0 for the error of one seed."""
    found = [scores[r] for scores in by_seed.values()]
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return statistics.mean(found), error


def table(results: dict[str, Any]) -> str:
    """Means and standard errors over the seeds, a row for each variant and reduction."""
    lines = []
    for name, report in results.items():
        lines += [
            "",
            f"{name}, {report['metric']} in per cent",
            "",
            "| variant | r | seeds | score |",
        ]
        lines.append("|---|---|---|---|")
        for variant, by_seed in report["variants"].items():
            for r in next(iter(by_seed.values())):
                mean, error = over_seeds(by_seed, r)
                score = f"{mean:.1f}" + (f" ± {error:.1f}" if len(by_seed) > 1 else "")
                lines.append(f"| {variant} | {r} | {len(by_seed)} | {score} |")
    return "\n".join(lines[1:])


def picture(demo: Adaptation, report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the score over how many times fewer operations the encoder has."""
    config = load_model(str(demo.coda), adapter_checkpoint=str(demo.coda / "adapter")).config
    shape = 1, demo.feature_lengths["inputs"]
    dense = flops.encoder_flops(config.replace(methods=unrouted(config.methods)), *shape)

    def ratio(r: str) -> float:
        methods = with_reduction(config.methods, float(r))
        return dense / flops.encoder_flops(config.replace(methods=methods), *shape)

    by_variant = {
        name: {r: over_seeds(by_seed, r) for r in found}
        for name, by_seed in report["variants"].items()
        for found in [next(iter(by_seed.values()))]
    }
    alone = {
        r: score
        for name, row in by_variant.items()
        if name in ("CoDA", "CoDA, smaller r") or name.endswith(" alone")
        for r, score in row.items()
    }
    lines = {"one adapter for all r": by_variant["elastic"], "an adapter for each r": alone}
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (label, scores), marker in zip(lines.items(), "os", strict=True):
        rs = sorted(scores, key=float)
        means, errors = zip(*(scores[r] for r in rs), strict=True)
        axes.errorbar([*map(ratio, rs)], means, errors, marker=marker, capsize=3, label=label)
    (reference,) = by_variant["parallel adapter, dense base"].values()
    axes.axhline(reference[0], color="grey", linestyle="--", label="parallel adapter")
    every = [reference, *alone.values(), *by_variant["elastic"].values()]
    lowest, highest = min(m - e for m, e in every), max(m + e for m, e in every)
    for r in sorted(by_variant["elastic"], key=float):
        place = ratio(r), lowest - 0.5
        axes.annotate(f"r = {r}", place, horizontalalignment="center")
    axes.set_ylim(lowest - 0.8, highest + 1.5)
    axes.set_xlabel("encoder: times fewer operations than with the parallel adapter")
    axes.set_ylabel(f"{report['metric']} on {report['task']}, %")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", choices=[*ADAPTATIONS])
    parser.add_argument("--variants", help="names, separated by ';'; all if it is not given")
    parser.add_argument("--dense", type=pathlib.Path, help="a dense checkpoint for the bundled one")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--table", action="store_true", help="prints the table and stops")
    parser.add_argument("--picture", type=pathlib.Path, help="draws it and stops")
    given = parser.parse_args()
    results = json.loads(given.json.read_text()) if given.json.exists() else {}
    if given.table:
        print(table(results))
        return
    demo = ADAPTATIONS[given.demo]
    demo = dataclasses.replace(demo, dense=given.dense or demo.dense)
    if given.picture:
        picture(demo, results[given.demo], given.picture)
        return
    known = variants(demo)
    names = given.variants.split(";") if given.variants else [*known]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no variants {unknown}, only {[*known]}")
    report = results.setdefault(given.demo, {"metric": demo.metric, "variants": {}})
    report |= {"task": demo.task, "steps": demo.steps}
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds.split(","):
            missing = [name for name in names if seed not in report["variants"].get(name, {})]
            if any(known[name].distill and known[name].own_adapter for name in missing):
                missing = [TEACHER, *(name for name in missing if name != TEACHER)]
            for name in missing:
                print(f"\n== {given.demo}: {name}, seed {seed} ==", flush=True)
                place, teacher = (
                    pathlib.Path(folder) / re.sub(r"\W+", "_", f"{seed} {x}")
                    for x in (name, TEACHER)
                )
                adapter = teacher / "export" / "adapter"
                model = adapted(demo, known[name], int(seed), place, adapter)
                found = scores(demo, known[name], model)
                report["variants"].setdefault(name, {})[seed] = found
                print(f"{name}, seed {seed}: {found}", flush=True)
                files.write_json(given.json, results)
    print(table({given.demo: report}))


if __name__ == "__main__":
    main()
