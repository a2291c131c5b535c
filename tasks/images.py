"""Images to the flattened patches that Pix2Struct takes, and tasks over them.

The steps are those of Pix2Struct (Lee et al. 2023, arXiv 2210.03347, and its public image
processor): a question becomes a header above the image; the image is standardised, scaled to as
many whole patches as are allowed without changing its shape more than rounding does, and cut.
"""

from collections.abc import Callable, Sequence
import math
import os
import textwrap

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
import seqio
import tensorflow as tf

from coda_jax import data

# The original draws headers in Arial, which is not free. A checkpoint that was trained with it is
# best served with a file of it.
DEFAULT_FONT = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
HEADER_FONT_SIZE = 36
HEADER_MARGIN = 5
HEADER_COLUMNS = 80  # characters of a line


def read_image(path: str, header: str = "", font: str | None = None) -> np.ndarray:
    """Reads an image file of any kind that Pillow knows.

    Args:
      path: the file.
      header: a text to draw above the image; "" for none.
      font: a TrueType file; None for `DEFAULT_FONT`.

    Returns:
      [height, width, 3] uint8.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no complete image, or has no pixels; the file is named.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no image {path!r}.")
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path!r} is not a readable image: {e}.") from e
    if 0 in image.size:
        raise ValueError(f"{path!r} has no pixels: its size is {image.size}.")
    return np.asarray(with_header(image, header, font) if header else image)


def with_header(image: Image.Image, header: str, font: str | None = None) -> Image.Image:
    """Puts a text above an image; the narrower of the two is scaled to the width of the other.

    Args:
      image: RGB.
      header: the text; it is wrapped into lines.
      font: a TrueType file; None for `DEFAULT_FONT`.

    Returns:
      The new image.
    """
    text = draw_text(header, font)
    width = max(text.width, image.width)
    height = int(image.height * (width / image.width))
    header_height = int(text.height * (width / text.width))
    joined = Image.new("RGB", (width, height + header_height), "white")
    joined.paste(text.resize((width, header_height)), (0, 0))
    joined.paste(image.resize((width, height)), (0, header_height))
    return joined


def draw_text(text: str, font: str | None = None) -> Image.Image:
    """Returns an image of a text, black on white, just large enough for it."""
    lines = "\n".join(textwrap.wrap(text, HEADER_COLUMNS))
    loaded = ImageFont.truetype(font or DEFAULT_FONT, HEADER_FONT_SIZE)
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), lines, font=loaded)
    width, height = (math.ceil(end) + 2 * HEADER_MARGIN for end in box[2:])
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((HEADER_MARGIN, HEADER_MARGIN), lines, fill="black", font=loaded)
    return image


def patches(image: tf.Tensor, max_patches: int | tf.Tensor, patch_size: int = 16) -> tf.Tensor:
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
    image = tf.cast(image, tf.float32)
    size = tf.shape(image)[:2]
    some = tf.debugging.Assert(tf.reduce_min(size) > 0, ["an image without pixels, of size", size])
    with tf.control_dependencies([some]):
        image = tf.image.per_image_standardization(image)
    sides = tf.cast(size, tf.float64) / patch_size
    scale = tf.sqrt(tf.cast(max_patches, tf.float64) / tf.reduce_prod(sides))
    grid = tf.clip_by_value(tf.cast(scale * sides, tf.int32), 1, max_patches)
    rows, columns = grid[0], grid[1]
    image = tf.image.resize(image, grid * patch_size, antialias=True)
    cut = tf.reshape(image, [rows, patch_size, columns, patch_size, 3])
    cut = tf.reshape(tf.transpose(cut, [0, 2, 1, 3, 4]), [rows * columns, 3 * patch_size**2])
    ids = tf.stack(tf.meshgrid(tf.range(rows), tf.range(columns), indexing="ij"), axis=-1) + 1
    return tf.concat([tf.cast(tf.reshape(ids, [-1, 2]), tf.float32), cut], axis=1)


def read_requests(path: str) -> list[dict[str, str]]:
    """Reads what `coda predict` asks of images.

    Args:
      path: a text file with the file of an image on each line, a .jsonl file whose lines have
        "image" and may have "header", or "-" for text on standard input.

    Returns:
      {"image"} or {"image", "header"} of each, in order.

    Raises:
      FileNotFoundError, ValueError: as `data.read_inputs` and `data.read_jsonl`.
    """
    if not path.endswith(".jsonl"):
        return [{"image": line} for line in data.read_inputs(path)]
    columns = data.read_jsonl(path, ("image",), optional=("header",))
    return [
        {"image": image, **({"header": header} if header else {})}
        for image, header in zip(columns["image"], columns["header"], strict=True)
    ]


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
    postprocess_fn: Callable = data.strip_text,
    metric_fns: Sequence[Callable] = (data.accuracy,),
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

    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            image_step,
            seqio.preprocessors.tokenize,
            to_patches,
            seqio.preprocessors.append_eos,
        ],
        output_features={
            "inputs": seqio.ContinuousFeature(rank=2, dtype=tf.float32),
            "targets": seqio.Feature(vocabulary=vocabulary, add_eos=True),
        },
        postprocess_fn=postprocess_fn,
        metric_fns=list(metric_fns),
        shuffle_buffer_size=1,  # The sources shuffle all records.
    )
