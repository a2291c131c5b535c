"""Images for the programs of an exported folder: a line is the name of a file.

pip install pillow

A question must be in the image already, where the model needs one: coda_jax draws it above.
"""

import math

import jax
import numpy as np
from PIL import Image, ImageOps

FIELD = "image"


def read(line, served, encode):
    """The patches [n, 2 + 3 p^2] of an image, at most as many as the programs take.

    Args:
        line: the file.
        served: the programs.
        encode: of texts; not used.
    """
    del encode
    picture = ImageOps.exif_transpose(Image.open(line)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    image = np.asarray(Image.alpha_composite(white, picture).convert("RGB"), np.float64)
    p = math.isqrt((served.channels[0] - 2) // 3)
    sides = np.array(image.shape[:2]) / p
    scale = math.sqrt(served.longest / sides.prod())
    rows, columns = np.clip((scale * sides).astype(int), 1, served.longest).tolist()
    small = jax.image.resize(image.astype(np.float32), (rows * p, columns * p, 3), "bilinear")
    spread = image.std()
    factor = min(1 / spread, math.sqrt(image.size)) if spread else 0.0
    pixels = (np.asarray(small) - image.mean()) * factor
    cut = pixels.reshape(rows, p, columns, p, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    places = np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1) + 1
    return np.concatenate([places, cut], axis=1).astype(np.float32)
