"""Image files to the flattened patches that Pix2Struct takes.

The steps are those of Pix2Struct (Lee et al. 2023, arXiv 2210.03347, and its public image
processor): a question becomes a header above the image; the image is standardised, scaled to as
many whole patches as are allowed without changing its shape more than rounding does, and cut.
"""

import math
import os
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from coda_jax.data.jsonl import read_inputs, read_jsonl
from coda_jax.optional import needs

with needs("images"):
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import tensorflow as tf

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
        raise FileNotFoundError(f"There is no image {path!r}")
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path!r} is not a readable image: {e}") from e
    if 0 in image.size:
        raise ValueError(f"{path!r} has no pixels: its size is {image.size}")
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
        FileNotFoundError, ValueError: as `jsonl.read_inputs` and `jsonl.read_jsonl`.
    """
    if not path.endswith(".jsonl"):
        return [{"image": line} for line in read_inputs(path)]
    columns = read_jsonl(path, ("image",), optional=("header",))
    return [
        {"image": image, **({"header": header} if header else {})}
        for image, header in zip(columns["image"], columns["header"], strict=True)
    ]
