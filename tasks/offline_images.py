"""Tasks from images to text that need no download.

Importing this module registers, for bytes: `digit_strips`, a few handwritten digits scattered over
a wide sheet -> the digits; and to pretrain on, `rendered_text`, printed words -> the words, and
`rendered_line`, the same with a single line on a sheet just high enough, to begin with. Sheets have
256 patches of 16 pixels, nearly all of them empty; those of one line have 64.
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
from coda_jax.tasks import images, stdlib_corpus

HEIGHT, WIDTH = 128, 512
LINE_HEIGHT = 32
# How many sheets there are of each split; each is drawn anew from its number whenever it is read.
SIZES = {"train": 100_000, "validation": 500, "test": 1_000}
SPLITS = tuple(SIZES)

DIGITS = (2, 5)  # the fewest and the most digits on a sheet
DIGIT_SIZE = (16, 32)  # pixels
SCANS_HELD_OUT = 0.15  # of the scans, for each of validation and test

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
)  # fmt: skip
FONT_SIZE = (14, 28)
MARGIN = 2  # pixels around a line of text
LINES = 3  # the most on a sheet of full height
WORDS_PER_LINE = 2  # the most
NUMBER_RATE = 0.3  # of the words, how many are numbers
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
    # The free width is shared out at random over the gaps, so that no two digits touch.
    gaps = np.sort(rng.integers(WIDTH - sizes.sum() + 1, size=len(chosen)))
    ink = np.zeros((HEIGHT, WIDTH))
    for scan, size, left in zip(chosen, sizes, gaps + np.cumsum(sizes) - sizes, strict=True):
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


def _word(split: str, rng: np.random.Generator) -> str:
    if rng.random() < NUMBER_RATE:
        return "".join(map(str, rng.integers(10, size=rng.integers(1, 7))))
    return words()[split][rng.integers(len(words()[split]))]


def rendered_text(split: str, number: int, height: int = HEIGHT, max_lines: int = LINES) -> Sheet:
    """Prints a few lines of words and numbers onto a sheet, each in a font of its own.

    Args:
      split: one of `SPLITS`; its words are in no other.
      number: of the sheet; the same number gives the same sheet.
      height: of the sheet in pixels.
      max_lines: the most lines.

    Returns:
      The image [height, WIDTH, 3] uint8, and the words as they are read, with spaces between.
    """
    rng = _generator(split, number, task=1)
    count = rng.integers(1, max_lines + 1)
    canvas = Image.new("L", (WIDTH, height), 0)
    draw, texts = ImageDraw.Draw(canvas), []
    for line in range(count):
        text = " ".join(_word(split, rng) for _ in range(rng.integers(1, WORDS_PER_LINE + 1)))
        font = _font(FONTS[rng.integers(len(FONTS))], int(rng.integers(*FONT_SIZE)))
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        band = height // count
        x = rng.integers(MARGIN, WIDTH - MARGIN - int(right - left)) - left
        y = band * line + rng.integers(MARGIN, band - MARGIN - int(bottom - top) + 1) - top
        draw.text((x, y), text, fill=255, font=font)
        texts.append(text)
    return _on_paper(np.asarray(canvas) / 255, rng), " ".join(texts)


rendered_line = functools.partial(rendered_text, height=LINE_HEIGHT, max_lines=1)


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


def _numbers(prepare: Callable, split: str) -> dict[str, list]:
    prepare()  # Here, once: the threads that draw would each start it.
    return {"split": [split] * SIZES[split], "number": list(range(SIZES[split]))}


for _name, _draw, _prepare in (
    ("digit_strips", digit_strip, scans),
    ("rendered_text", rendered_text, words),
    ("rendered_line", rendered_line, words),
):
    images.add_task(
        _name,
        data.MemorySource(functools.partial(_numbers, _prepare), SPLITS, SIZES),
        _draw_step(_draw),
        seqio.ByteVocabulary(extra_ids=data.BYTE_EXTRA_IDS),
    )
