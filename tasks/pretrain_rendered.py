"""Renders people's own texts as images; the target is the visible text.

`task` registers it for a vocabulary. Each image shows words of a text from a random one on, in
lines, in some bundled font, and has as many patches as the inputs; what fits neither on it nor into
the targets is not drawn.
"""

from collections.abc import Callable, Sequence
import functools
import math

from jaxtyping import UInt8
import numpy as np
import seqio
import tensorflow as tf

from coda_jax import checks
from coda_jax.data import seqio_tasks
from coda_jax.optional import needs
from coda_jax.tasks import images, offline_images, registry, texts

with needs("images"):
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw

SHAPE = 4  # an image is about so many times as wide as high
FONT_SIZE = (14, 28)  # pixels
LINE = 1.25  # height of a line, in font sizes
MARGIN = 4  # pixels


def task(
    vocabulary: str,
    *,
    files: str | Sequence[str] | None = None,
    tfds_name: str | None = None,
    seqio_name: str | None = None,
    field: str = "text",
    patch_size: int = 16,
) -> str:
    """Registers the task, once, and returns the name that it has in seqio. For gin files.

    Args:
        vocabulary: a path, or "bytes", for `seqio_tasks.seqio_vocabulary`.
        files: see `texts.sources`, as for the next three.
        tfds_name: a TFDS data set.
        seqio_name: a task or mixture of seqio.
        field: of the records, a text.
        patch_size: the model's.

    Returns:
        "pretrain_rendered", with a number appended where other arguments have that name.

    Raises:
        FileNotFoundError: no files match, or there is no such vocabulary.
        ValueError: as for `texts.sources`.
    """
    checks.COUNT("patch_size", patch_size)
    needed = texts.Needed(_has_words, "no text has a word that the bundled fonts can show")
    found = texts.sources(files, tfds_name, seqio_name, field, needed)

    def add_one(source: seqio.DataSource, name: str) -> seqio.Task:
        step = functools.partial(_printed, patch_size=patch_size)
        known = seqio_tasks.seqio_vocabulary(vocabulary)
        return images.add_task(name, source, step, known, patch_size=patch_size)

    def add(registered: str) -> seqio.Task | seqio.Mixture:
        parts = {
            part: (functools.partial(add_one, source), rate)
            for part, ((source,), rate) in found.items()
        }
        return registry.add_mixed(registered, parts)

    arguments = (vocabulary, files, tfds_name, seqio_name, field, patch_size)
    return registry.once("pretrain_rendered", arguments, add)


@functools.lru_cache(maxsize=1)
def characters() -> frozenset[str]:
    """Returns the characters that all of the bundled fonts have."""
    paths = [offline_images.font(name, FONT_SIZE[0]).path for name in offline_images.FONTS]
    return frozenset(map(chr, set.intersection(*(set(FT2Font(p).get_charmap()) for p in paths))))


def words(text: str) -> list[str]:
    """Returns the words of a text that the fonts can show."""
    return [word for word in text.split() if characters().issuperset(word)]


def canvas(num_patches: int, patch_size: int = 16) -> tuple[int, int]:
    """Returns height and width of an image of at most `num_patches`, which is not scaled."""
    rows = max(1, math.isqrt(num_patches // SHAPE))
    return rows * patch_size, num_patches // rows * patch_size


def page(
    shown: Sequence[str],
    size: tuple[int, int],
    fits: Callable[[str], bool],
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "height width 3"], str]:
    """Prints words from a random one on, as many as there is room for.

    Args:
        shown: the words, at least one.
        size: height and width.
        fits: whether a text may be the target.
        rng: of the place, the font and the paper.

    Returns:
        The image, and the text on it: the words with single spaces between.
    """
    height, width = size
    largest = max(1, int((height - 2 * MARGIN) / LINE))
    pixels = min(largest, int(rng.integers(FONT_SIZE[0], FONT_SIZE[1] + 1)))
    font = offline_images.font(
        offline_images.FONTS[rng.integers(len(offline_images.FONTS))], pixels
    )
    start = rng.integers(len(shown))
    first = _cut(shown[start], width, lambda x: font.getlength(x) <= width - 2 * MARGIN and fits(x))
    lines = [first]
    for word in shown[start + 1 :] if first == shown[start] else ():
        if not fits(" ".join([*lines, word])):
            break
        longer = f"{lines[-1]} {word}"
        if font.getlength(longer) <= width - 2 * MARGIN:
            lines[-1] = longer
        elif len(lines) < int((height - 2 * MARGIN) / (LINE * pixels)) and (
            font.getlength(word) <= width - 2 * MARGIN
        ):
            lines.append(word)
        else:
            break
    image = Image.new("L", (width, height))
    for number, line in enumerate(lines):
        place = MARGIN, MARGIN + int(number * LINE * pixels)
        ImageDraw.Draw(image).text(place, line, fill=255, font=font)
    return offline_images.on_paper(np.asarray(image) / 255, rng), " ".join(lines)


def _cut(word: str, most: int, fits: Callable[[str], bool]) -> str:
    """The longest start of a word that fits and has at most so many letters, at least one."""
    ends = range(min(len(word), most), 1, -1)
    return next((word[:end] for end in ends if fits(word[:end])), word[0])


def _has_words(text: tf.Tensor) -> tf.Tensor:
    """Whether the fonts can show a word of a text."""
    found = tf.numpy_function(lambda x: bool(words(x.decode())), [text], tf.bool)
    return tf.ensure_shape(found, [])


def _printed(
    dataset: tf.data.Dataset, sequence_length, output_features, patch_size: int
) -> tf.data.Dataset:
    """seqio's preprocessor from "text" to "image" and "targets", the text that is seen."""
    size = canvas(sequence_length["inputs"], patch_size)
    vocabulary, most = output_features["targets"].vocabulary, sequence_length["targets"]

    def fits(text: str) -> bool:
        return len(vocabulary.encode(text)) < most  # EOS comes behind it

    def draw(text, seed):
        rng = np.random.default_rng([int(x) % 2**32 for x in seed])
        image, seen = page(words(text.decode()), size, fits, rng)
        return image, seen.encode()

    @seqio.map_over_dataset(num_seeds=1)
    def printed(example, seed):
        kinds = tf.uint8, tf.string
        image, seen = tf.numpy_function(draw, [example["text"], seed], kinds, stateful=False)
        return {"image": image, "targets": tf.ensure_shape(seen, [])}

    return printed(dataset.filter(lambda example: _has_words(example["text"])))
