"""What a run is asked for: how long it lasts, how often it logs, evaluates and saves."""

import dataclasses

from coda_jax import checks, methods
from coda_jax.objectives import Model
from coda_jax.training import routing_schedule
from coda_jax.training.steps import NORM


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How long and how often.

    Attributes:
        total_steps: steps of the whole run, those before a restart included; None where they are
            counted later, of epochs.
        accumulation: parts into which a batch is cut, to be worked through one after the other.
        max_grad_norm: gradients are scaled down to this global norm; None for no limit.
        seed: of dropout, of noise, and of the reductions that are drawn.
        log_every: steps between log entries.
        save_every: steps between checkpoints, each with an evaluation before it.
        keep: checkpoints kept.
        best_metric: the metric of an evaluation, one of the model's `metrics`, by which the kept
            ones are chosen; None: by age.
        patience: the run ends early when so many evaluations in a row were not better than the best
            before them, by `best_metric`; None: it never does.
        reductions: each step trains at one of these r, drawn by the seed and the step, so that one
            adapter serves at all of them; None for the model's own.
        reduction_start: r goes from here to the model's own in the first half of the run, in
            stages; 1 starts at the dense model; None for no such start.
        epsilon_start: the temperature of the routing falls from here to the model's own, in stages;
            None for the model's own throughout.
    """

    total_steps: int | None
    accumulation: int = 1
    max_grad_norm: float | None = 1.0
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    keep: int = 3
    best_metric: str | None = None
    patience: int | None = None
    reductions: tuple[float | tuple[float, ...], ...] | None = None
    reduction_start: float | None = None
    epsilon_start: float | None = None

    def __post_init__(self):
        counts = ("accumulation", "log_every", "save_every", "keep")
        checks.fields(
            self,
            **dict.fromkeys(counts, checks.COUNT),
            **dict.fromkeys(("total_steps", "patience"), checks.Maybe(checks.COUNT)),
            max_grad_norm=checks.Maybe(NORM),
            seed=checks.SEED,
            best_metric=checks.Maybe(checks.text),
            **routing_schedule.CHECKS,
        )
        if self.patience is not None and self.best_metric is None:
            raise ValueError(
                f"TrainOptions.patience={self.patience} needs a best_metric, such as 'loss', whose "
                "best it waits for"
            )

    def methods_of(self, model: Model, step: int) -> tuple[methods.Method, ...]:
        """The model's methods as they route at a step, counted from 0.

        Raises:
            ValueError: the options change a routing that the model does not have.
        """
        names = ("total_steps", "seed", *routing_schedule.CHECKS)
        values = {name: getattr(self, name) for name in names}
        return routing_schedule.routed(model.config.methods, step, **values)

    def check_model(self, model: Model) -> None:
        """Raises ValueError where the model cannot be trained as the options say."""
        methods.check_steps(model.config.methods, self.total_steps)
        for r in self.reductions or (None,):
            options = dataclasses.replace(self, reductions=r and (r,))
            for step in (0, self.total_steps - 1):
                model.config.replace(methods=options.methods_of(model, step))

    def best_mode(self, model: Model, evaluates: bool) -> str:
        """Whether more of the best metric is better, "max", or less, "min".

        Args:
            model: that is trained.
            evaluates: whether there is something to evaluate it on.

        Raises:
            ValueError: the model has no such metric, or is not evaluated.
        """
        if self.best_metric is None:
            return "max"
        name = f"TrainOptions.best_metric={self.best_metric!r}"
        if self.best_metric not in model.metrics:
            raise ValueError(f"{name} must be one of {[*model.metrics]} of {model.name!r}")
        if not evaluates:
            raise ValueError(f"{name} needs data to evaluate on, a split 'validation'")
        return model.metrics[self.best_metric].better
