"""The speech tasks that need no download: what is in a recording, and that splits share nothing."""

import itertools

import numpy as np
import pytest

from coda_jax.data import audio
from coda_jax.data.seqio_tasks import seqio_examples
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.tasks import offline_speech, voices

RATE = audio.SAMPLE_RATE
TASKS = tuple(offline_speech.RECIPES)
LENGTHS = {"spoken_digits": (400, 10), "spoken_digits_clean": (200, 6)}  # as in gin_configs/tasks


@pytest.mark.all
@pytest.mark.parametrize("name", TASKS)
def test_a_recording_depends_on_its_split_and_number_alone(name):
    made = {
        (split, i): offline_speech.spoken_digits(name, split, i)
        for split in offline_speech.SPLITS
        for i in range(4)
    }
    for (split, i), (samples, text) in made.items():
        again, same_text = offline_speech.spoken_digits(name, split, i)
        np.testing.assert_array_equal(samples, again)
        assert text == same_text
        assert samples.dtype == np.float32 and np.abs(samples).max() == pytest.approx(0.5)
        assert len(samples) == RATE * offline_speech.RECIPES[name][split].seconds
    assert len({samples.tobytes() for samples, _ in made.values()}) == len(made)


def test_voices_and_pitches_of_held_out_splits_are_not_in_training():
    def of(recipe, attribute):
        return {getattr(speaker, attribute) for speaker in recipe.speakers}

    adapted, clean = (offline_speech.RECIPES[name] for name in TASKS)
    for split in ("validation", "test"):
        for recipes in (adapted, clean):
            assert not of(recipes[split], "pitch") & of(recipes["train"], "pitch")
        assert not of(adapted[split], "voice") & of(adapted["train"], "voice")
        assert not of(adapted[split], "voice") & of(clean["train"], "voice")
    assert of(clean["train"], "voice") < of(adapted["train"], "voice")
    every = of(adapted["train"], "voice") | of(adapted["test"], "voice")
    assert every == set(voices.SPELLINGS)


@pytest.mark.parametrize("tempo", [0.8, 1.0, 1.25])
def test_a_faster_clip_is_shorter_and_higher_and_as_loud(tempo):
    time = np.arange(RATE // 5) / RATE
    clip = np.sin(2 * np.pi * 3000 * time).astype(np.float32)
    found = offline_speech.played(clip, tempo)
    assert found.dtype == np.float32 and len(found) == round(len(clip) / tempo)
    bins = np.abs(np.fft.rfft(found))
    assert bins.argmax() * RATE / len(found) == pytest.approx(3000 * tempo, abs=10)
    assert np.mean(found**2) == pytest.approx(np.mean(clip**2), rel=0.01)


@pytest.fixture
def tones(monkeypatch):
    """In place of each digit a tone of its own: (digit + 1) * 500 Hz, 0.2 s, rms 1."""
    time = np.arange(RATE // 5) / RATE
    clips = [np.sqrt(2) * np.sin(2 * np.pi * 500 * (i + 1) * time) for i in range(10)]
    clips = tuple(clip.astype(np.float32) for clip in clips)
    monkeypatch.setattr(voices, "recordings", lambda speakers: (clips,) * len(speakers))


def heard(samples):
    """The runs of windows of 10 ms that are loud, as (digit of its tone, seconds)."""
    windows = samples.reshape(-1, RATE // 100)
    loud = (windows**2).mean(1) > 0.5 * (windows**2).mean(1).max()
    pitch = np.abs(np.fft.rfft(windows)).argmax(1) * 100 / 500 - 1
    digits = [round(p) if there else None for p, there in zip(pitch, loud, strict=True)]
    runs = [(digit, len(list(run)) / 100) for digit, run in itertools.groupby(digits)]
    return [(digit, seconds) for digit, seconds in runs if digit is not None and seconds > 0.1]


@pytest.mark.parametrize("name", TASKS)
def test_the_digits_of_the_target_are_heard_in_their_order_and_in_full(name, tones, monkeypatch):
    monkeypatch.setattr(offline_speech, "noise", lambda rng, length, colour: np.zeros(length))
    monkeypatch.setattr(offline_speech, "played", lambda clip, tempo: clip)
    fewest, most = offline_speech.RECIPES[name]["train"].digits
    counts = set()
    for number in range(30):
        samples, text = offline_speech.spoken_digits(name, "train", number)
        digits = [int(word) for word in text.split(" ")]
        counts.add(len(digits))
        found = heard(samples)
        merged = [digit for digit, _ in itertools.groupby(digits)]  # equal ones may be neighbours
        assert [digit for digit, _ in itertools.groupby(d for d, _ in found)] == merged
        assert sum(seconds for _, seconds in found) == pytest.approx(0.2 * len(digits), abs=0.1)
    assert counts == set(range(fewest, most + 1))


def test_speech_is_as_far_above_the_noise_as_the_recipe_says(tones):
    for split in ("train", "test"):
        lowest, highest = offline_speech.RECIPES["spoken_digits"][split].decibels
        found = []
        for number in range(40):
            samples, _ = offline_speech.spoken_digits("spoken_digits", split, number)
            power = np.sort((samples.reshape(-1, RATE // 20) ** 2).mean(1))
            quiet, loud = power[: len(power) // 2].mean(), power[-4:].mean()
            found.append(10 * np.log10(loud / quiet - 1))
        assert lowest - 2.5 < min(found) < lowest + 3 and highest - 3 < max(found) < highest + 2.5


def test_noise_is_white_to_pink(rng):
    for colour in (0.0, 1.0):
        samples = offline_speech.noise(rng, 1 << 17, colour)
        power = np.abs(np.fft.rfft(samples)) ** 2
        low, high = power[1000:2000].mean(), power[32000:64000].mean()  # 5 octaves apart
        assert np.log2(low / high) == pytest.approx(5 * colour, abs=0.3)
        assert np.mean(samples**2) == pytest.approx(1, rel=1e-3)
        assert abs(samples.mean()) < 1e-4


@pytest.mark.parametrize("name", TASKS)
def test_tasks_give_the_frames_of_their_recordings(name):
    inputs, targets = LENGTHS[name]
    examples = seqio_examples(
        name,
        "test",
        feature_lengths={"inputs": inputs, "targets": targets},
        seed=0,
        shuffle=False,
        num_epochs=1,
    )
    vocabulary = ByteVocabulary()
    for number in range(3):
        example = next(examples)
        samples, text = offline_speech.spoken_digits(name, "test", number)
        assert example["inputs"].shape == (inputs - 1, 161)
        assert np.isfinite(example["inputs"]).all()
        np.testing.assert_allclose(example["inputs"], audio.frames(samples), atol=1e-4)
        assert example["targets"].tolist() == [*vocabulary.encode(text), 1]


def test_only_few_recordings_are_made_before_the_first_is_given(monkeypatch):
    """The order is shuffled, not the recordings: a buffer of them would take their time first."""
    made, noise = [], offline_speech.noise
    monkeypatch.setattr(offline_speech, "noise", lambda *args: made.append(1) or noise(*args))
    lengths = dict(zip(("inputs", "targets"), LENGTHS["spoken_digits_clean"], strict=True))
    examples = seqio_examples(
        "spoken_digits_clean",
        "validation",
        feature_lengths=lengths,
        seed=0,
        shuffle=True,
        num_epochs=1,
    )
    first = next(examples)["targets"].tolist()
    assert 1 <= len(made) < 100
    _, text = offline_speech.spoken_digits("spoken_digits_clean", "validation", 0)
    assert first != [*ByteVocabulary().encode(text), 1]


def test_no_target_is_cut():
    for name, recipes in offline_speech.RECIPES.items():
        longest = 2 * max(recipe.digits[1] for recipe in recipes.values())  # digits, spaces, EOS
        assert longest == LENGTHS[name][1]


@pytest.mark.all
def test_the_most_digits_of_the_slowest_speakers_fit():
    """Also those of captcha's clips, the longest of which lasts 0.58 s."""
    slowest = min(offline_speech.PITCHES) * min(offline_speech.SPEEDS)
    for recipes in offline_speech.RECIPES.values():
        for recipe in recipes.values():
            longest = max(len(c) for clips in voices.recordings(recipe.speakers) for c in clips)
            longest = max(longest / RATE, 0.58 / slowest)
            assert recipe.digits[1] * longest / recipe.tempo[0] < recipe.seconds
