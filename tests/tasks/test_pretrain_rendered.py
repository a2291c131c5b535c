"""Texts of one's own, printed: what the targets say is on the image, and fits."""

import numpy as np
import pytest
import seqio

from coda_jax.data import seqio_tasks
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.tasks import offline, offline_images, pretrain_rendered

LENGTHS = {"inputs": 256, "targets": 48}
TEXT = "Some words of a text, and naïve Ωmega — more and more of them on the 2nd line.\n" * 30


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"{i} {TEXT}", encoding="utf-8")
    return str(tmp_path)


def read(name, lengths=LENGTHS, seed=0):
    return [
        *seqio_tasks.seqio_examples(
            name, "train", feature_lengths=lengths, seed=seed, shuffle=False, num_epochs=1
        )
    ]


def test_images_have_the_patches_of_the_inputs_and_targets_are_words_of_the_text(folder):
    name = pretrain_rendered.task("bytes", files=folder)
    found, vocabulary = read(name), ByteVocabulary()
    assert len(found) > 20
    for example in found:
        assert example["inputs"].shape == (256, 2 + 3 * 16**2)
        tokens = example["targets"].tolist()
        assert len(tokens) <= 48 and tokens[-1] == 1
        assert f" {vocabulary.decode(tokens)} " in " " + " ".join(TEXT.split() * 2) + " "
    assert len({vocabulary.decode(x["targets"].tolist()) for x in found}) > 10
    again = read(name)
    assert all(np.array_equal(x["inputs"], y["inputs"]) for x, y in zip(found, again, strict=True))
    other = read(name, seed=1)
    assert any(
        x["targets"].tolist() != y["targets"].tolist() for x, y in zip(found, other, strict=True)
    )


@pytest.mark.parametrize("count", [1, 16, 100, 512, 2048])
def test_a_canvas_has_at_most_so_many_patches_and_is_not_scaled(count):
    height, width = pretrain_rendered.canvas(count)
    assert 0.9 * count < height * width // 256 <= count
    scale = (count * 256 / (height * width)) ** 0.5
    assert int(scale * height / 16) == height // 16 and int(scale * width / 16) == width // 16


def printed(words, size=(128, 512), most=1000, seed=0):
    rng = np.random.default_rng(seed)
    return pretrain_rendered.page(words, size, lambda text: len(text) < most, rng)


def test_what_is_on_the_image_are_the_words_of_the_target(monkeypatch):
    """A line less, or a word less, is less ink; all of it lies within the margins."""
    monkeypatch.setattr(offline_images, "on_paper", lambda ink, rng: ink)
    words = [f"word{i}" for i in range(400)]
    for seed in range(20):
        ink, text = printed(words, seed=seed)
        shown = text.split()
        start = words.index(shown[0])
        assert shown == words[start : start + len(shown)]
        assert ink.shape == (128, 512) and not ink[-2:].any() and not ink[:, -2:].any()
        if start + len(shown) < 400:
            rows = np.flatnonzero(ink.any(axis=1))
            assert rows[-1] > 128 - 2 * 28 * pretrain_rendered.LINE - 8  # it is full
        fewer, less = printed(words, most=len(text), seed=seed)
        assert less == " ".join(shown[:-1]) and 0 < fewer.sum() < ink.sum()


def test_a_word_that_is_too_long_is_cut():
    image, text = printed(["x" * 500])
    assert image.shape == (128, 512, 3) and image.dtype == np.uint8
    assert 10 < len(text) < 100 and set(text) == {"x"}
    assert printed(["long"], most=3)[1] == "lo"
    assert printed(["W"], size=(16, 16))[1] == "W"


def test_the_fonts_show_the_alphabets_that_they_are_said_to():
    assert pretrain_rendered.characters().issuperset("azAZ09äßéñ.,;!?()€ΑΩαωЖя—")
    assert pretrain_rendered.words("one 日本 two🙂 три") == ["one", "три"]


def test_texts_without_a_word_that_can_be_shown_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "日本"}\n' * 3 + '{"text": "two words"}\n' * 3)
    name = pretrain_rendered.task("bytes", files=str(tmp_path))
    assert len(read(name)) == 3
    (tmp_path / "a.jsonl").write_text('{"text": "日本"}\n')
    with pytest.raises(ValueError, match="no text has a word that the bundled fonts can show"):
        read(pretrain_rendered.task("bytes", files=(str(tmp_path),)))


def test_a_task_is_registered_once_and_reads_a_mixture_at_its_rates(folder):
    name = pretrain_rendered.task("bytes", files=folder)
    assert pretrain_rendered.task("bytes", files=folder) == name
    assert offline.PRETRAIN_RATES  # the module has registered these:
    seqio.MixtureRegistry.add("inner", [("stdlib_module", 1.0), ("stdlib_exception", 2.0)])
    mixed = pretrain_rendered.task("bytes", seqio_name="inner", field="inputs")
    mixture = seqio.MixtureRegistry.get(mixed)
    assert sorted(mixture.get_rate(task) for task in mixture.tasks) == [1.0, 2.0]
