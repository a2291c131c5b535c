"""The image tasks that need no download: what is on a sheet, and that splits share nothing."""

import numpy as np
import pytest
import seqio

from coda_jax.data.images import patches
from coda_jax.data.seqio_tasks import seqio_examples
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.tasks import offline_images

DRAW = {
    "digit_strips": offline_images.digit_strip,
    "rendered_text": offline_images.rendered_text,
}


@pytest.mark.parametrize("name", DRAW)
def test_a_sheet_depends_on_its_split_and_number_alone(name):
    draw = DRAW[name]
    sheets = {(split, i): draw(split, i) for split in offline_images.SPLITS for i in range(4)}
    for (split, i), (image, text) in sheets.items():
        again, same_text = draw(split, i)
        np.testing.assert_array_equal(image, again)
        assert text == same_text
        assert image.shape == (128, 512, 3) and image.dtype == np.uint8
    assert len({image.tobytes() for image, _ in sheets.values()}) == len(sheets)


def test_no_scan_is_in_two_splits_and_each_split_has_every_digit():
    scans = offline_images.scans()
    assert sum(len(labels) for _, labels in scans.values()) == 1797
    seen = [{picture.tobytes() for picture in pictures} for pictures, _ in scans.values()]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    for _, labels in scans.values():
        assert set(labels) == set(range(10)) and len(labels) > 200


def test_strips_are_mostly_background_and_hold_their_digits_from_left_to_right(monkeypatch):
    """Each digit's own ink is found, in order, in the columns of the sheet."""
    monkeypatch.setattr(offline_images, "on_paper", lambda ink, rng: ink)
    shares = []
    for number in range(40):
        ink, text = offline_images.digit_strip("train", number)
        assert 2 <= len(text) <= 5 and text.isdigit()
        patches = ink.reshape(8, 16, 32, 16).max(axis=(1, 3)) > 0.2
        shares.append(patches.mean())
        # Runs of inked columns: at least one a digit, as no two digits overlap.
        columns = np.concatenate([[0], (ink.max(axis=0) > 0.2).astype(int)])
        assert (np.diff(columns) == 1).sum() >= len(text) - 1
    assert 0.02 < np.mean(shares) < 0.1


def test_a_digit_can_be_recognised_where_it_was_put(monkeypatch):
    """A strip's digit, cut out and shrunk, is nearest to scans of its class."""
    monkeypatch.setattr(offline_images, "on_paper", lambda ink, rng: ink)
    monkeypatch.setattr(offline_images, "DIGITS", (1, 1))
    monkeypatch.setattr(offline_images, "DIGIT_SIZE", (32, 32))
    pictures, labels = offline_images.scans()["validation"]
    right = 0
    for number in range(30):
        ink, text = offline_images.digit_strip("validation", number)
        windows = np.lib.stride_tricks.sliding_window_view(ink, (32, 32))
        mass = windows.sum(axis=(2, 3))
        top, left = np.unravel_index(mass.argmax(), mass.shape)
        small = windows[top, left].reshape(8, 4, 8, 4).mean(axis=(1, 3))
        distances = ((pictures - small) ** 2).sum(axis=(1, 2))
        right += str(labels[distances.argmin()]) == text
    assert right >= 24  # the window with the most ink may be a pixel or two off


def test_words_are_of_one_split_and_sheets_hold_words_and_numbers():
    words = offline_images.words()
    lower = {split: {word.lower() for word in found} for split, found in words.items()}
    assert not lower["train"] & lower["validation"] and not lower["train"] & lower["test"]
    assert len(words["train"]) > 2000
    texts = [offline_images.rendered_text("validation", i)[1] for i in range(200)]
    others = [text for text in texts if not text.isdigit()]
    assert all(any(w.startswith(text) for w in words["validation"]) for text in others)
    assert 30 < len(others) < 90
    # With EOS they have the length in gin_configs/tasks/rendered_text.gin.
    assert {len(text) for text in texts} == set(range(1, 7))


def test_printed_letters_lie_apart_and_within_the_sheet(monkeypatch):
    """The ink at the borders would be cut-off letters; "0" alone has one run of inked columns."""
    monkeypatch.setattr(offline_images, "on_paper", lambda ink, rng: ink)
    monkeypatch.setattr(offline_images, "_text", lambda split, rng: "0" * rng.integers(1, 6))
    for number in range(200):
        ink, text = offline_images.rendered_text("train", number)
        border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert ink.max() > 0.3
        assert not (border > 0.1).any(), number
        columns = np.concatenate([[0], (ink.max(axis=0) > 0.1).astype(int)])
        assert (np.diff(columns) == 1).sum() == len(text)


@pytest.fixture
def one_font(monkeypatch):
    """Upright, sharp letters of one font, as Pillow draws them."""
    monkeypatch.setattr(offline_images, "FONTS", ("DejaVuSans",))
    monkeypatch.setattr(offline_images, "FONT_SIZE", (40, 40))
    monkeypatch.setattr(offline_images, "TILT", 0)
    monkeypatch.setattr(offline_images, "COARSENESS", 1)


def test_an_upright_sharp_letter_is_as_pillow_draws_it(one_font, rng):
    font = offline_images.font("DejaVuSans", 40)
    mask = font.getmask("R")
    expected = np.array(mask).reshape(mask.size[::-1]) / 255
    np.testing.assert_array_equal(offline_images._letter("R", rng)[2:-2, 2:-2], expected)


def test_letters_are_tilted_to_both_sides_as_far_as_allowed(one_font, monkeypatch, rng):
    monkeypatch.setattr(offline_images, "TILT", 10)
    degrees = []
    for _ in range(50):
        y, x = np.nonzero(offline_images._letter("l", rng) > 0.5)
        degrees.append(np.degrees(np.arctan(np.polyfit(y, x, 1)[0])))
    assert -10.5 < min(degrees) < -7 and 7 < max(degrees) < 10.5


def test_a_coarse_letter_has_as_much_ink_and_fainter_edges(one_font, monkeypatch, rng):
    sharp = offline_images._letter("8", rng)
    monkeypatch.setattr(offline_images, "COARSENESS", 5)
    coarse = [offline_images._letter("8", rng) for _ in range(20)]
    ink = np.array([letter.sum() for letter in coarse])
    edges = [np.abs(np.diff(letter, axis=1)).max() for letter in coarse]
    np.testing.assert_allclose(ink, sharp.sum(), rtol=0.1)
    assert min(edges) < 0.5 * np.abs(np.diff(sharp, axis=1)).max()


def test_inked_patches_are_those_with_letters_in_their_places():
    for number in range(10):
        image, _ = offline_images.rendered_text("test", number)
        every = patches(image, 256).numpy()
        inked = offline_images.inked_patches(image, 64).numpy()
        assert inked.shape == (64, 770)
        at = {tuple(patch[:2]): patch for patch in every}
        for patch in inked:
            np.testing.assert_array_equal(patch, at[tuple(patch[:2])])
        places = [tuple(patch[:2]) for patch in inked]
        assert places == sorted(set(places))
        contrast = {place: np.ptp(patch[2:]) for place, patch in at.items()}
        left_out = [contrast[place] for place in at.keys() - set(places)]
        assert max(left_out) <= min(contrast[place] for place in places)


def test_fonts_have_all_letters_and_digits():
    for name in offline_images.FONTS:
        font = offline_images.font(name, 20)
        missing = font.getmask("\uffff").getbbox()
        for character in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789":
            assert font.getmask(character).getbbox(), (name, character)
            same = font.getmask(character).getbbox() == missing
            assert not same or bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def test_the_words_are_read_before_threads_draw_them():
    """Several threads that parse the standard library at once stop one another."""
    offline_images.words.cache_clear()
    seqio.get_mixture_or_task("rendered_text").source.get_dataset("train")
    assert offline_images.words.cache_info().currsize == 1


@pytest.mark.parametrize("name", [*DRAW, "rendered_text_inked"])
def test_tasks_give_the_patches_of_their_sheets(name):
    assert seqio.get_mixture_or_task(name).num_input_examples("test") == 1000
    draw = DRAW[name.removesuffix("_inked")]
    cut, count = patches, 256  # nothing is scaled
    if name.endswith("_inked"):
        cut, count = offline_images.inked_patches, 64
    examples = seqio_examples(
        name,
        "test",
        feature_lengths={"inputs": count, "targets": 8},
        seed=0,
        shuffle=False,
        num_epochs=1,
    )
    vocabulary = ByteVocabulary()
    for number in range(3):
        example = next(examples)
        image, text = draw("test", number)
        assert example["inputs"].shape == (count, 770)
        np.testing.assert_allclose(example["inputs"], cut(image, count), atol=1e-5)
        assert example["targets"].tolist() == [*vocabulary.encode(text), 1]
