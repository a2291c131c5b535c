"""Which checkpoints T5X keeps: the best by a metric of its evaluation, and the newest."""

from collections.abc import Callable
import functools

from coda_jax import checks


def keeps_best(checkpointer: Callable, metric: str, mode: str = "max") -> Callable:
    """T5X's SaveBestCheckpointer in the one form in which T5X uses it with orbax, a partial.

    Given as the class, T5X takes it for any other one, and keeps the newest checkpoints.

    Args:
        checkpointer: T5X's class.
        metric: of a step, as TensorBoard shows it: the folder of events in the run's, and its name.
        mode: "max" where more of it is better, or "min".

    Raises:
        ValueError: `mode` is another word; `metric` has no folder.
    """
    checks.OneOf(("max", "min"))("BEST_MODE", mode)
    if "/" not in checks.text("BEST_METRIC", metric):
        raise ValueError(
            f"BEST_METRIC={metric!r} has no folder of events before its name, as "
            "'training_eval/TASK/loss' has"
        )
    return functools.partial(checkpointer, metric_name_to_monitor=metric, metric_mode=mode)
