"""seqio tasks from images to text, over the patches that `coda_jax.data.images` makes."""

from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf

from coda_jax.data import seqio_tasks
from coda_jax.data.images import patches, read_image


def load_images(font: str | None = None) -> Callable:
    """Returns the seqio preprocessor that turns "image", a file, and "header" into pixels."""

    def load(path, header):
        return read_image(path.decode(), header.decode(), font)

    @seqio.map_over_dataset
    def read(example):
        example = dict(example)
        arguments = [example["image"], example.pop("header")]
        return {**example, "image": tf.numpy_function(load, arguments, tf.uint8)}

    return read


def add_task(
    name: str,
    source: seqio.DataSource,
    image_step: Callable,
    vocabulary: seqio.Vocabulary,
    *,
    patch_size: int = 16,
    cut: Callable = patches,
    postprocess_fn: Callable = seqio_tasks.strip_text,
    metric_fns: Sequence[Callable] = (seqio_tasks.accuracy,),
) -> seqio.Task:
    """Registers a task from images to text; "inputs" is at most its length of patches.

    Args:
        name: the name of the task.
        source: of records with "targets" and what `image_step` needs.
        image_step: seqio preprocessor that makes "image", [height, width, 3] uint8.
        vocabulary: of the targets.
        patch_size: height and width of a patch.
        cut: (image, the most patches, `patch_size`) -> "inputs".
        postprocess_fn: of seqio.
        metric_fns: of seqio.

    Returns:
        The task.
    """

    def to_patches(dataset, sequence_length):
        def convert(example):
            example = dict(example)
            image = tf.ensure_shape(example.pop("image"), [None, None, 3])
            return {**example, "inputs": cut(image, sequence_length["inputs"], patch_size)}

        return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    return seqio_tasks.add_task(
        name,
        source,
        [image_step, seqio.preprocessors.tokenize, to_patches],
        vocabulary,
        vectors=True,
        postprocess_fn=postprocess_fn,
        metric_fns=metric_fns,
    )
