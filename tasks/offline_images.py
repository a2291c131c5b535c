"""Tasks from images to text that need no download.

Importing this module registers, for bytes: `digit_strips`, a few handwritten digits scattered over
a wide sheet -> the digits; and to pretrain on, `rendered_text`, the first letters of a word or a
number, printed and scattered alike. All are read from left to right, at whatever height they stand.
Sheets have 256 patches of 16 pixels, nearly all of them empty; in `rendered_text_inked`, to begin
with, only those with the most contrast are left.
"""

import functools
import os
import re

import numpy as np
import tensorflow as tf

from coda_jax.data.images import patches
from coda_jax.data.seqio_tasks import seqio_vocabulary
from coda_jax.optional import needs
from coda_jax.tasks import drawn, images, stdlib_corpus
from coda_jax.tasks.drawn import SPLITS

with needs("images"):
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    from sklearn.datasets import load_digits

HEIGHT, WIDTH = 128, 512
DIGITS = (2, 5)  # the fewest and the most digits on a sheet
DIGIT_SIZE = (16, 32)  # pixels
SCANS_HELD_OUT = 0.15  # of the scans, for each of validation and test

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
)  # fmt: skip
FONT_SIZE = (22, 44)  # pixels
TILT = 15.0  # degrees, the most
COARSENESS = 3.0  # pixels, the most, of a scan that is then enlarged; the digits' are 2 to 4
MARGIN = 2  # pixels around a letter
NUMBER_RATE = 0.7  # how many of the texts are numbers
TEXT_LENGTH = 6  # letters or digits, the most; few are likelier, which are learned first
WORD = re.compile(r"(?<![A-Za-z])[A-Za-z][a-z]{1,9}(?![A-Za-z])")

Sheet = tuple[np.ndarray, str]


def _generator(split: str, number: int, task: int) -> np.random.Generator:
    return np.random.default_rng([task, SPLITS.index(split), number])


def on_paper(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns ink [height, width] of 0 to 1 on grainy paper, as [height, width, 3] uint8."""
    paper, contrast, grain = rng.uniform(200, 255), rng.uniform(120, 200), rng.uniform(0, 10)
    sheet = paper - contrast * ink + grain * rng.standard_normal(ink.shape)
    return np.repeat(sheet.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _placed(pieces: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """The ink [HEIGHT, WIDTH] of pieces [height, width] from left to right, at any height."""
    ink = np.zeros((HEIGHT, WIDTH))
    lefts = drawn.scattered(np.array([piece.shape[1] for piece in pieces]), WIDTH, rng)
    for piece, left in zip(pieces, lefts, strict=True):
        height, width = piece.shape
        top = rng.integers(HEIGHT - height + 1)
        ink[top : top + height, left : left + width] = piece
    return ink


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
    scanned = [Image.fromarray(pictures[scan].astype(np.float32)) for scan in chosen]
    enlarged = [
        np.clip(scan.resize((size, size), Image.Resampling.BICUBIC), 0, 1)
        for scan, size in zip(scanned, sizes, strict=True)
    ]
    return on_paper(_placed(enlarged, rng), rng), "".join(map(str, labels[chosen]))


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

    Each has a font of its own, is tilted a little and as blurred as a coarse scan, which is what
    the digits of `digit_strip` are.

    Args:
        split: one of `SPLITS`; its words are in no other.
        number: of the sheet; the same number gives the same sheet.

    Returns:
        The image [HEIGHT, WIDTH, 3] uint8, and the letters or digits.
    """
    rng = _generator(split, number, task=1)
    text = _text(split, rng)
    letters = [_letter(letter, rng) for letter in text]
    return on_paper(_placed(letters, rng), rng), text


def _letter(letter: str, rng: np.random.Generator) -> np.ndarray:
    """The ink [height, width] of 0 to 1 of a letter in some font, tilted, scanned and enlarged."""
    chosen = font(
        FONTS[rng.integers(len(FONTS))], int(rng.integers(FONT_SIZE[0], FONT_SIZE[1] + 1))
    )
    left, top, right, bottom = chosen.getbbox(letter)
    canvas = Image.new("L", (right - left + 2 * MARGIN, bottom - top + 2 * MARGIN))
    ImageDraw.Draw(canvas).text((MARGIN - left, MARGIN - top), letter, fill=255, font=chosen)
    canvas = canvas.rotate(rng.uniform(-TILT, TILT), Image.Resampling.BICUBIC, expand=True)
    pixels = rng.uniform(1, COARSENESS)
    scan = canvas.resize([round(side / pixels) for side in canvas.size], Image.Resampling.BOX)
    return np.asarray(scan.resize(canvas.size, Image.Resampling.BICUBIC)) / 255


@functools.cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns one of `FONTS`; its `path` is the file."""
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(folder, f"{name}.ttf"), size)


def inked_patches(image: tf.Tensor, count: int | tf.Tensor, patch_size: int = 16) -> tf.Tensor:
    """The patches of a sheet with the most contrast; the others are left out.

    Args:
        image: [HEIGHT, WIDTH, 3], of 0 to 255.
        count: how many are left.
        patch_size: p, height and width of a patch.

    Returns:
        [count, 2 + 3 p^2] float32: those of `patches` in their order, with their places.
    """
    every = patches(image, HEIGHT * WIDTH // patch_size**2, patch_size)
    pixels = every[:, 2:]
    contrast = tf.reduce_max(pixels, axis=1) - tf.reduce_min(pixels, axis=1)
    return tf.gather(every, tf.sort(tf.math.top_k(contrast, count).indices))


for _name, _draw, _prepare, _cut in (
    ("digit_strips", digit_strip, scans, patches),
    ("rendered_text", rendered_text, words, patches),
    ("rendered_text_inked", rendered_text, words, inked_patches),
):
    images.add_task(
        _name,
        drawn.source(lambda split, prepare=_prepare: prepare()),
        drawn.step(_draw, tf.uint8, lambda image: {"image": image}),
        seqio_vocabulary("bytes"),
        cut=_cut,
    )
