"""Image files to the flattened patches that Pix2Struct takes.

The steps are those of Pix2Struct (Lee et al. 2023, arXiv 2210.03347, and its public image
processor): a question becomes a header above the image; the image is standardised, scaled to as
many whole patches as are allowed without changing its shape more than rounding does, and cut.
"""

import os
from typing import TYPE_CHECKING

import numpy as np

from coda_jax.data import image_files
from coda_jax.data.headers import DEFAULT_FONT, with_header
from coda_jax.optional import needs

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["DEFAULT_FONT", "patches", "read_image", "with_header"]

_BLOCK = 2**21  # values that are held as float64 at once


def read_image(path: str, header: str = "", font: str | None = None) -> np.ndarray:
    """Reads an image file as a person sees it; see `image_files`.

    Args:
        path: the file.
        header: a text to draw above the image; "" for none.
        font: a TrueType file; None for `DEFAULT_FONT`.

    Returns:
        [height, width, 3] uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `image_files.read` or `with_header` refuses it; the file is named.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no image {path!r}")
    try:
        image = image_files.read(path)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path!r} is not a readable image: {e}") from e
    if header:
        try:
            image = with_header(image, header, font)
        except ValueError as e:
            raise ValueError(f"{path!r}: {e}") from e
    return np.asarray(image)


def patches(
    image: "tf.Tensor", max_patches: "int | tf.Tensor", patch_size: int = 16
) -> "tf.Tensor":
    """Scales, standardises and cuts an image.

    With s = sqrt(max_patches p^2 / (height width)), the image is scaled to floor(s height / p) rows
    and floor(s width / p) columns of patches, each at least 1 and at most max_patches.

    Args:
        image: [height, width, 3], of 0 to 255.
        max_patches: the most patches.
        patch_size: p, height and width of a patch.

    Returns:
        [rows * columns, 2 + 3 p^2] float32: row and column from 1, then the pixels of the patch.

    Raises:
        tf.errors.InvalidArgumentError: the image has no pixels.
    """
    with needs():  # Here: only patches need it.
        import tensorflow as tf

    size = tf.shape(image)[:2]
    some = tf.debugging.Assert(tf.reduce_min(size) > 0, ["an image without pixels, of size", size])
    with tf.control_dependencies([some]):
        mean, factor = _standard(tf.reshape(image, [-1]))
    sides = tf.cast(size, tf.float64) / patch_size
    scale = tf.sqrt(tf.cast(max_patches, tf.float64) / tf.reduce_prod(sides))
    grid = tf.clip_by_value(tf.cast(scale * sides, tf.int32), 1, max_patches)
    rows, columns = grid[0], grid[1]
    # Standardised once it is small: scaling is linear, and its weights add up to 1.
    image = tf.cast(tf.image.resize(image, grid * patch_size, antialias=True), tf.float32)
    image = (image - mean) * factor
    cut = tf.reshape(image, [rows, patch_size, columns, patch_size, 3])
    cut = tf.reshape(tf.transpose(cut, [0, 2, 1, 3, 4]), [rows * columns, 3 * patch_size**2])
    ids = tf.stack(tf.meshgrid(tf.range(rows), tf.range(columns), indexing="ij"), axis=-1) + 1
    return tf.concat([tf.cast(tf.reshape(ids, [-1, 2]), tf.float32), cut], axis=1)


def _standard(values: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
    """The mean m and the factor f, float32, for which (x - m) f has mean 0 and variance 1.

    As `tf.image.per_image_standardization`, which holds several copies of the image as float32.
    f is at most sqrt(n), and 0 where all values are the same.
    """
    with needs():
        import tensorflow as tf

    def sums(start):
        block = tf.cast(values[start : start + _BLOCK], tf.float64)
        return tf.stack([tf.reduce_sum(block), tf.reduce_sum(tf.square(block))])

    count = tf.size(values)
    blocks = tf.map_fn(
        sums, tf.range(0, count, _BLOCK), fn_output_signature=tf.float64, parallel_iterations=1
    )
    count = tf.cast(count, tf.float64)
    mean, square = tf.unstack(tf.reduce_sum(blocks, axis=0) / count)
    variance = square - tf.square(mean)
    factor = tf.minimum(tf.math.rsqrt(tf.maximum(variance, 0)), tf.sqrt(count))
    same = tf.equal(values[0], tf.reduce_min(values)) & tf.equal(values[0], tf.reduce_max(values))
    factor = tf.where(same, tf.zeros_like(factor), factor)
    return tf.cast(mean, tf.float32), tf.cast(factor, tf.float32)
