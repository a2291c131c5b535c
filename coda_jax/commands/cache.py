"""`coda cache`: a task's tokenised examples in one npz file, to train without TensorFlow."""

from collections.abc import Mapping


def cache(
    task: str,
    output: str,
    feature_lengths: Mapping[str, int],
    split: str = "train",
    seed: int = 0,
    num_epochs: int = 1,
) -> None:
    """Writes the examples of a task; see `data.seqio_tasks.cache_task`."""
    from coda_jax.data import seqio_tasks  # Here: it imports TensorFlow.

    seqio_tasks.cache_task(
        task, split, output, feature_lengths=feature_lengths, seed=seed, num_epochs=num_epochs
    )
