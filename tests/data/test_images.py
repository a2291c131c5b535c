"""Images to patches: as the public image processor makes them; what cannot be read is named."""

from pathlib import Path

import numpy as np
from PIL import Image
import pytest
import seqio
import tensorflow as tf

from coda_jax.data import images, seqio_tasks
from coda_jax.tasks.images import add_task, load_images

GOLDEN = Path(__file__).parents[1] / "golden"
PHOTOS = ("astronaut", "coffee", "rocket", "coins", "page", "text")
QUESTION = (
    "Who is the author of this book, when was it first published, and what are the names of those "
    "who wrote its preface?"
)
# In standard deviations of the image; TensorFlow and PyTorch round positions of pixels differently.
TOLERANCE = 1e-3


@pytest.fixture(name="processor", scope="module")
def fixture_processor():
    """transformers' image processor of Pix2Struct."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.pix2struct import image_processing_pil_pix2struct

    return image_processing_pil_pix2struct.Pix2StructImageProcessorPil()


def photo(name):
    """A photo or a scanned page that scikit-image ships."""
    pictures = pytest.importorskip("skimage.data")
    return Image.fromarray(getattr(pictures, name)()).convert("RGB")


@pytest.mark.parametrize("name", PHOTOS)
def test_patches_equal_those_of_the_public_processor(processor, name):
    image = photo(name)
    for max_patches in (100, 1024):
        theirs = processor.preprocess(image, max_patches=max_patches, return_tensors="np")
        theirs = theirs["flattened_patches"][0]
        ours = images.patches(np.asarray(image), max_patches).numpy()
        assert 0.8 * max_patches < len(ours) <= max_patches
        np.testing.assert_array_equal(ours[:, :2], theirs[: len(ours), :2])
        np.testing.assert_allclose(ours, theirs[: len(ours)], atol=TOLERANCE)
        assert not theirs[len(ours) :].any()


def test_patches_equal_the_golden_ones():
    golden = np.load(GOLDEN / "pix2struct" / "patches.npz")
    ours = images.patches(golden["image"], len(golden["patches"])).numpy()
    assert len(ours) == 18 and not golden["patches"][18:].any()
    np.testing.assert_allclose(ours, golden["patches"][:18], atol=TOLERANCE)


@pytest.mark.parametrize("size", [(16, 16), (700, 3), (2, 900), (1, 1)])
def test_patches_of_odd_shapes_equal_those_of_the_public_processor(processor, size, rng):
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = processor.preprocess(Image.fromarray(image), max_patches=20, return_tensors="np")
    ours = images.patches(image, 20).numpy()
    np.testing.assert_allclose(ours, theirs["flattened_patches"][0][: len(ours)], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["coffee", "page"])
def test_headers_equal_those_of_the_public_processor(processor, name):
    """To the bit, for the same font."""
    image = photo(name)
    pixels = np.moveaxis(np.asarray(image), -1, 0)
    for question in ("Title?", QUESTION):
        theirs = processor.render_header(pixels, question, font_path=images.DEFAULT_FONT)
        ours = np.asarray(images.with_header(image, question))
        np.testing.assert_array_equal(ours, np.moveaxis(theirs, 0, -1))


def test_patches_are_the_pieces_of_the_image_in_reading_order(rng):
    """Where nothing is scaled: the patches put together are the standardised image."""
    image = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    found = images.patches(image, 6, patch_size=2).numpy()
    assert found[:, :2].tolist() == [[row, column] for row in (1, 2) for column in (1, 2, 3)]
    joined = found[:, 2:].reshape(2, 3, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(4, 6, 3)
    np.testing.assert_allclose(joined, (image - image.mean()) / image.std(), atol=1e-5)


def test_an_image_of_one_colour_is_zero_and_not_infinite():
    found = images.patches(np.full((32, 32, 3), 9, np.uint8), 4).numpy()
    np.testing.assert_array_equal(found[:, 2:], 0)
    assert (found[:, :2] > 0).all()  # and no patch of it counts as padding


def test_an_image_without_pixels_is_an_error():
    with pytest.raises(tf.errors.InvalidArgumentError, match="an image without pixels"):
        images.patches(np.zeros((0, 5, 3), np.uint8), 4)


def test_modes_of_image_files_are_read_as_rgb(tmp_path, rng):
    gray = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(
        images.read_image(str(tmp_path / "gray.png")), np.stack([gray] * 3, -1)
    )
    Image.fromarray(gray).convert("P").save(tmp_path / "palette.gif")
    assert images.read_image(str(tmp_path / "palette.gif")).shape == (5, 7, 3)


def truncated(tmp_path):
    """A file that ends too early."""
    path = tmp_path / "whole.png"
    Image.fromarray(np.arange(12000, dtype=np.uint8).reshape(40, 100, 3)).save(path)
    return path.read_bytes()[:90]


@pytest.mark.parametrize("content", [b"", b"not an image", truncated])
def test_unreadable_images_are_named(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content if isinstance(content, bytes) else content(tmp_path))
    with pytest.raises(ValueError, match=r"bad\.png' is not a readable image"):
        images.read_image(str(path))
    with pytest.raises(FileNotFoundError, match=r"no image .*missing\.png"):
        images.read_image(str(tmp_path / "missing.png"))


@pytest.fixture(name="folder")
def fixture_folder(tmp_path, rng):
    """A good and a bad image."""
    for name, size in (("wide", (20, 60)), ("high", (90, 30))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    return tmp_path


def register(name, folder, files, headers):
    columns = {
        "image": [str(folder / file) for file in files],
        "header": headers,
        "targets": ["ab"] * len(files),
    }
    seqio.TaskRegistry.remove(name)
    add_task(
        name,
        seqio_tasks.MemorySource(lambda split: columns, ["train"]),
        load_images(),
        seqio_tasks.seqio_vocabulary("bytes"),
        patch_size=4,
    )


def examples(name, **lengths):
    lengths = {"inputs": 30, "targets": 8, **lengths}
    return list(
        seqio_tasks.seqio_examples(
            name, "train", feature_lengths=lengths, seed=0, shuffle=False, num_epochs=1
        )
    )


def test_a_task_gives_the_patches_of_its_files_with_their_headers(folder):
    register("images_good", folder, ["wide.png", "high.png"], ["", "Why?"])
    first, second = examples("images_good")
    assert first["targets"].tolist() == [100, 101, 1]
    plain = images.read_image(str(folder / "wide.png"))
    np.testing.assert_allclose(first["inputs"], images.patches(plain, 30, 4), atol=1e-5)
    asked = images.read_image(str(folder / "high.png"), "Why?")
    assert asked.shape[0] / asked.shape[1] > 3  # the header made it higher
    np.testing.assert_allclose(second["inputs"], images.patches(asked, 30, 4), atol=1e-5)


@pytest.mark.parametrize(
    ("file", "error"), [("bad.png", ValueError), ("missing.png", FileNotFoundError)]
)
def test_a_task_stops_at_an_unreadable_image_and_names_it(folder, file, error):
    register("images_bad", folder, ["wide.png", file], ["", ""])
    with pytest.raises(error, match=file.replace(".", r"\.")):
        examples("images_bad")
