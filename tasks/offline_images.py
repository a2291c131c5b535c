"""Tasks from images to text that need no download.

Importing this module registers, for bytes: `digit_strips`, a few handwritten digits scattered over
a wide sheet -> the digits; and to pretrain on, `rendered_text`, the first letters of a word or a
number, printed and scattered alike. All are read from left to right, at whatever height they stand.
Sheets have 256 patches of 16 pixels, nearly all of them empty; in `rendered_text_inked`, to begin
with, only those with the most contrast are left.
"""

from collections.abc import Callable
import functools
import os
import re

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
import seqio
from sklearn.datasets import load_digits
import tensorflow as tf

from coda_jax import data
from coda_jax.tasks import drawn, images, stdlib_corpus
from coda_jax.tasks.drawn import SPLITS

HEIGHT, WIDTH = 128, 512
DIGITS = (2, 5)  # the fewest and the most digits on a sheet
DIGIT_SIZE = (16, 32)  # pixels
SCANS_HELD_OUT = 0.15  # of the scans, for each of validation and test

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
)  # fmt: skip
FONT_SIZE = (20, 32)  # pixels
MARGIN = 2  # pixels around a letter
NUMBER_RATE = 0.7  # how many of the texts are numbers
TEXT_LENGTH = 6  # letters or digits, the most; few are likelier, which are learned first
WORD = re.compile(r"(?<![A-Za-z])[A-Za-z][a-z]{1,9}(?![A-Za-z])")

Sheet = tuple[np.ndarray, str]


def _generator(split: str, number: int, task: int) -> np.random.Generator:
    return np.random.default_rng([task, SPLITS.index(split), number])


def _on_paper(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns ink [height, width] of 0 to 1 on grainy paper, as [height, width, 3] uint8."""
    paper, contrast, grain = rng.uniform(200, 255), rng.uniform(120, 200), rng.uniform(0, 10)
    sheet = paper - contrast * ink + grain * rng.standard_normal(ink.shape)
    return np.repeat(sheet.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


@functools.lru_cache(maxsize=1)
def scans() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns scikit-learn's scans of digits by split: [n, 8, 8] of 0 to 1 and their labels [n].

    Neighbours are often by one hand, so the splits are runs of their order: most hands of the
    held-out scans are not in training.
    """
    digits = load_digits()
    held_out = round(len(digits.target) * SCANS_HELD_OUT)
    runs = {"train": slice(-2 * held_out), "validation": slice(-2 * held_out, -held_out)}
    runs["test"] = slice(-held_out, None)
    return {split: (digits.images[run] / 16, digits.target[run]) for split, run in runs.items()}


def digit_strip(split: str, number: int) -> Sheet:
    """Draws a sheet with scans of the split, at places of their own from left to right.

    Args:
      split: one of `SPLITS`.
      number: of the sheet; the same number gives the same sheet.

    Returns:
      The image [HEIGHT, WIDTH, 3] uint8, and the digits in their order.
    """
    rng = _generator(split, number, task=0)
    pictures, labels = scans()[split]
    chosen = rng.integers(len(labels), size=rng.integers(DIGITS[0], DIGITS[1] + 1))
    sizes = rng.integers(DIGIT_SIZE[0], DIGIT_SIZE[1] + 1, size=len(chosen))
    ink = np.zeros((HEIGHT, WIDTH))
    for scan, size, left in zip(chosen, sizes, drawn.scattered(sizes, WIDTH, rng), strict=True):
        top = rng.integers(HEIGHT - size + 1)
        picture = Image.fromarray(pictures[scan].astype(np.float32))
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        ink[top : top + size, left : left + size] = np.clip(picture, 0, 1)
    return _on_paper(ink, rng), "".join(map(str, labels[chosen]))


@functools.lru_cache(maxsize=1)
def words() -> dict[str, tuple[str, ...]]:
    """Returns the words of the standard library's functions by split, none in two of them."""
    functions = stdlib_corpus.read_corpus().functions
    found = sorted({word for f in functions for word in WORD.findall(f.source)})
    return {
        split: tuple(word for word in found if stdlib_corpus.split_of(word.lower()) == split)
        for split in SPLITS
    }


def _text(split: str, rng: np.random.Generator) -> str:
    length = rng.integers(1, TEXT_LENGTH + 1, size=2).min()
    if rng.random() < NUMBER_RATE:
        return "".join(map(str, rng.integers(10, size=length)))
    return words()[split][rng.integers(len(words()[split]))][:length]


def rendered_text(split: str, number: int) -> Sheet:
    """Prints the first letters of a word, or a number, each letter and digit at a place of its own.

    Args:
      split: one of `SPLITS`; its words are in no other.
      number: of the sheet; the same number gives the same sheet.

    Returns:
      The image [HEIGHT, WIDTH, 3] uint8, and the letters or digits.
    """
    rng = _generator(split, number, task=1)
    text = _text(split, rng)
    font = _font(FONTS[rng.integers(len(FONTS))], int(rng.integers(FONT_SIZE[0], FONT_SIZE[1] + 1)))
    canvas = Image.new("L", (WIDTH, HEIGHT), 0)
    draw = ImageDraw.Draw(canvas)
    boxes = np.array([draw.textbbox((0, 0), letter, font=font) for letter in text], int)
    widths, heights = boxes[:, 2:].T - boxes[:, :2].T + 2 * MARGIN
    lefts, tops = drawn.scattered(widths, WIDTH, rng), rng.integers(HEIGHT - heights + 1)
    corners = np.stack([lefts, tops], axis=1) + MARGIN - boxes[:, :2]
    for letter, corner in zip(text, corners, strict=True):
        draw.text(tuple(corner), letter, fill=255, font=font)
    return _on_paper(np.asarray(canvas) / 255, rng), text


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(folder, f"{name}.ttf"), size)


def _draw_step(draw: Callable[[str, int], Sheet]) -> Callable:
    """Returns the seqio preprocessor that draws the sheets whose split and number it gets."""

    def draw_bytes(split, number):
        image, text = draw(split.decode(), int(number))
        return image, text.encode()

    @seqio.map_over_dataset
    def step(example):
        arguments = [example["split"], example["number"]]
        image, text = tf.numpy_function(draw_bytes, arguments, (tf.uint8, tf.string))
        return {"image": image, "targets": tf.ensure_shape(text, [])}

    return step


def inked_patches(image: tf.Tensor, count: int | tf.Tensor, patch_size: int = 16) -> tf.Tensor:
    """The patches of a sheet with the most contrast; the others are left out.

    Args:
      image: [HEIGHT, WIDTH, 3], of 0 to 255.
      count: how many are left.
      patch_size: p, height and width of a patch.

    Returns:
      [count, 2 + 3 p^2] float32: those of `images.patches` in their order, with their places.
    """
    every = images.patches(image, HEIGHT * WIDTH // patch_size**2, patch_size)
    pixels = every[:, 2:]
    contrast = tf.reduce_max(pixels, axis=1) - tf.reduce_min(pixels, axis=1)
    return tf.gather(every, tf.sort(tf.math.top_k(contrast, count).indices))


for _name, _draw, _prepare, _cut in (
    ("digit_strips", digit_strip, scans, images.patches),
    ("rendered_text", rendered_text, words, images.patches),
    ("rendered_text_inked", rendered_text, words, inked_patches),
):
    images.add_task(
        _name,
        drawn.source(lambda split, prepare=_prepare: prepare()),
        _draw_step(_draw),
        seqio.ByteVocabulary(extra_ids=data.BYTE_EXTRA_IDS),
        cut=_cut,
    )
