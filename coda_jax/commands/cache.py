"""`coda cache`: a task's tokenised examples in one npz file, to train without TensorFlow."""

from collections.abc import Mapping

from coda_jax import checks, files
from coda_jax.data.source import LONGEST


def cache(
    task: str,
    output: str,
    feature_lengths: Mapping[str, int] | None = None,
    split: str = "train",
    seed: int = 0,
    num_epochs: int = 1,
) -> None:
    """Writes the examples of a task, whole; see `data.seqio_tasks.cache_task`.

    Args:
        task: name of a task or mixture.
        output: the npz file.
        feature_lengths: for tasks that make examples of the length, and the limits of a training;
            texts have defaults, vectors need that of "inputs".
        split: of the task.
        seed: for tasks with noise.
        num_epochs: see `cache_task`.

    Raises:
        ValueError: no limit for vectors; and see `cache_task`.
    """
    from coda_jax.data import seqio_tasks  # Here: it imports TensorFlow.

    checks.paths(OUTPUT=output)
    files.prepare(output)
    given = dict(feature_lengths or {})
    found = seqio_tasks.provider(task)
    if found.output_features["inputs"].rank == 2 and "inputs" not in given:
        raise ValueError(f"{task} has inputs that are vectors: give TASK_FEATURE_LENGTHS['inputs']")
    lengths = {"inputs": LONGEST, "targets": LONGEST} | given
    count = seqio_tasks.cache_task(found, split, output, lengths, seed=seed, num_epochs=num_epochs)
    if seqio_tasks.is_mixture(found):
        print(f"{task} is a mixture: its rates are not kept, each example is there {num_epochs}x")
    print(f"{output}: {count:,} examples")
