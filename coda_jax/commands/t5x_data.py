"""A T5X run that goes on takes the batches that it has not taken yet, as an undisturbed one does.

T5X reads its data from their beginning whenever it starts. A step takes a batch, and the order of
the batches is that of their seed: so the ones that were taken are left out. `data.json` in the
run's folder says what the data are, and at which step they began.
"""

from collections.abc import Callable, Mapping, Sequence
import os
from typing import Any

from absl import logging
import jax

from coda_jax import checks
from coda_jax.checkpoints.t5x_record import (
    DATA_RECORD,
    DataRecord,
    has_checkpoints,
    read_data_record,
    run_folder,
    saved_steps,
    write_data_record,
)
from coda_jax.methods import Method, max_segments
from coda_jax.training.run_identity import differences

_FIELDS = ("split", "batch_size", "shuffle", "seed", "use_cached", "pack")


def identity(dataset: Any, methods: Sequence[Method]) -> dict[str, Any]:
    """What decides the batches of a training and their order, as JSON.

    Args:
        dataset: T5X's DatasetConfig.
        methods: the run's, of whose room for examples a packed row has no more.
    """
    task = dataset.mixture_or_task_name
    return {
        "task": getattr(task, "name", task),
        "task_feature_lengths": dict(dataset.task_feature_lengths),
        **{name: getattr(dataset, name) for name in _FIELDS},
        "max_segments": max_segments(methods) if dataset.pack else None,
    }


def resumed(
    dataset: Any,
    *args: Any,
    get_dataset: Callable,
    model_dir: str | os.PathLike,
    data: Mapping[str, Any],
    change_data: bool = False,
    **kwargs: Any,
) -> Any:
    """T5X's `get_dataset_fn`: the batches of a run without those that it took before.

    Args:
        dataset: T5X's DatasetConfig of the training.
        *args: T5X's.
        get_dataset: T5X's function that this one is in the place of.
        model_dir: the run's folder.
        data: their `identity`.
        change_data: whether a run may go on with other data, from their beginning.
        **kwargs: T5X's.

    Returns:
        A tf.data.Dataset. Where it starts from its beginning although the run goes on, a line of
        the log says why.

    Raises:
        ValueError: the run began with other data; each value that differs is named.
    """
    checks.flag("CHANGE_DATA", change_data)
    batches = get_dataset(dataset, *args, **kwargs)
    taken = _taken(model_dir, data, change_data)
    return batches.skip(taken) if taken else batches


def record_data(model_dir: str | os.PathLike, data: Mapping[str, Any], step: int) -> None:
    """Says in a run's folder what its data are; those with which it goes on are said already.

    Args:
        model_dir: the run's folder.
        data: their `identity`.
        step: T5X's at this start.
    """
    folder = run_folder(model_dir)
    known = read_data_record(folder) if has_checkpoints(folder) else None
    if known is None or known.data != data:
        write_data_record(folder, DataRecord(step, jax.process_count(), data))


def _taken(model_dir: str | os.PathLike, data: Mapping[str, Any], change_data: bool) -> int:
    """How many batches a run that goes on has taken; 0 for another one, and where nobody knows."""
    folder = run_folder(model_dir)
    steps = saved_steps(folder)
    if not steps:
        return 0
    record, again = read_data_record(folder), f"{model_dir}: the data start from their beginning"
    if record is None:
        logging.warning("%s: how many of them its checkpoint has seen is not known", again)
        return 0
    if lines := differences(record.data, data):
        text = "\n  ".join(lines)
        if not change_data:
            raise ValueError(
                f"{model_dir} holds a run with other data:\n  {text}\n"
                "Give these values again; CHANGE_DATA=True goes on with the new ones"
            )
        logging.warning("%s: they are others than before:\n  %s", again, text)
        return 0
    if data["seed"] is None:
        logging.warning("%s, in another order: RANDOM_SEED=None", again)
        return 0
    if record.processes != jax.process_count():
        logging.warning(
            "%s: %s processes shared a batch and now %s do, so that it has other examples",
            *(model_dir, record.processes, jax.process_count()),
        )
    taken = steps[-1] - record.first_step
    if taken < 0:
        raise ValueError(
            f"{folder}: the data began at step {record.first_step}, after its last checkpoint, of "
            f"step {steps[-1]}: put the checkpoints back, or remove {DATA_RECORD}"
        )
    logging.info("%s goes on after %s batches, which are made again first", model_dir, f"{taken:,}")
    return taken
