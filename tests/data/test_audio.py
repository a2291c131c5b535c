"""Audio to frames: as the public feature extractor makes them; what cannot be read is named."""

from pathlib import Path

import captcha
import numpy as np
import pytest
import soundfile
import tensorflow as tf

from coda_jax.data import audio
from coda_jax.tasks.audio import load_audio

GOLDEN = Path(__file__).parents[1] / "golden"
# In standard deviations of a bin. The public extractor normalises in float32.
TOLERANCE = 1e-5


@pytest.fixture(name="extractor", scope="module")
def fixture_extractor():
    """transformers' feature extractor of w2v-BERT 2.0, [samples] -> [N, 160]."""
    transformers = pytest.importorskip("transformers")
    extractor = transformers.SeamlessM4TFeatureExtractor()

    def extract(samples):
        found = extractor(samples, sampling_rate=16000, return_tensors="np")
        return found["input_features"][0][found["attention_mask"][0] > 0]

    return extract


def tone(num_samples, rate=16000):
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / rate)


def test_features_of_recordings_equal_those_of_the_public_extractor(extractor):
    """Real voices: the clips that captcha ships, 8 kHz and 8 bits."""
    clips = sorted(Path(captcha.__file__).parent.glob("data/*/*.wav"))
    assert len(clips) > 30
    for clip in clips[::3]:
        samples = audio.read_audio(str(clip))
        ours = audio.features(samples).numpy()
        assert len(ours) == (1 + (len(samples) - 400) // 160) // 2 >= 10
        np.testing.assert_allclose(ours, extractor(samples), atol=TOLERANCE)


@pytest.mark.parametrize("num_samples", [560, 719, 720, 880, 16000])
def test_features_of_any_length_equal_those_of_the_public_extractor(extractor, num_samples, rng):
    """The few windows of a short one may differ little in a bin, which makes rounding larger."""
    samples = (0.1 * rng.normal(size=num_samples)).astype(np.float32)
    np.testing.assert_allclose(audio.features(samples), extractor(samples), atol=100 * TOLERANCE)


def test_features_equal_the_golden_ones():
    """With silence at the end, whose bins lie on the floor."""
    golden = np.load(GOLDEN / "w2v_bert" / "features.npz")
    ours = audio.features(golden["samples"]).numpy()
    assert ours.shape == golden["features"].shape == (14, 160)
    np.testing.assert_allclose(ours, golden["features"], atol=TOLERANCE)


def test_bins_are_normalised_over_the_utterance(rng):
    found = audio.features(rng.normal(size=16000)).numpy().reshape(-1, 80)
    assert found.shape == (98, 80)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(0, ddof=1), 1, atol=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_silence_is_zero_and_not_infinite(level):
    """Also with an offset; and no frame of it counts as padding."""
    frames = audio.frames(np.full(16000, level, np.float32)).numpy()
    np.testing.assert_allclose(frames[:, 1:], 0, atol=1e-6)
    assert frames.shape == (49, 161) and (frames[:, 0] == 1).all()


def test_too_few_samples_are_an_error():
    assert audio.features(np.zeros(audio.MIN_SAMPLES, np.float32)).shape == (1, 160)
    with pytest.raises(tf.errors.InvalidArgumentError, match="audio of so few samples"):
        audio.features(np.zeros(audio.MIN_SAMPLES - 1, np.float32))


@pytest.mark.parametrize("kind", ["wav", "flac"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_any_rate_and_number_of_channels_is_read_as_one_channel_of_16_khz(tmp_path, kind, rate):
    left, right = tone(rate, rate), 0.5 * tone(rate, rate)
    path = str(tmp_path / f"stereo.{kind}")
    soundfile.write(path, np.stack([left, right], axis=1), rate)
    found = audio.read_audio(path)
    assert found.shape == (16000,) and found.dtype == np.float32
    middle = slice(1000, -1000)  # away from the ends of the filter
    np.testing.assert_allclose(found[middle], 0.75 * tone(16000)[middle], atol=2e-3)


def test_resampling_keeps_out_what_16_khz_cannot_hold(tmp_path):
    path = str(tmp_path / "high.wav")
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 12000 * np.arange(48000) / 48000), 48000)
    assert np.abs(audio.read_audio(path)[500:-500]).max() < 5e-3


@pytest.fixture(name="write")
def fixture_write(tmp_path):
    """Returns a function that writes some bytes, or a part of a good file, and gives its path."""

    def write(content):
        path = tmp_path / "bad.wav"
        soundfile.write(path, tone(16000), 16000, format="FLAC" if content == "flac" else "WAV")
        whole = path.read_bytes()
        parts = {"half": whole[:16000], "header": whole[:30], "flac": whole[: len(whole) // 2]}
        path.write_bytes(parts[content] if isinstance(content, str) else content)
        return str(path)

    return write


@pytest.mark.parametrize("content", [b"", b"not audio at all" * 50, "half", "header", "flac"])
def test_unreadable_audio_is_named(write, content):
    with pytest.raises(ValueError, match=r"bad\.wav' is not a readable audio file: ."):
        audio.read_audio(write(content))


def test_what_can_be_read_but_not_used_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no audio file .*missing\.wav"):
        audio.read_audio(str(tmp_path / "missing.wav"))
    path = str(tmp_path / "bad.wav")
    for samples, text in (
        (np.zeros(0), "is too short: 0 samples at 16 kHz, a frame needs 560"),
        (np.zeros(559), "is too short: 559 samples"),
        (np.array([0.0, np.nan] * 400), "has samples that are not finite"),
    ):
        soundfile.write(path, samples, 16000, subtype="FLOAT")
        with pytest.raises(ValueError, match=rf"bad\.wav' {text}"):
            audio.read_audio(path)


def test_a_stream_of_unknown_size_is_read(tmp_path):
    path = tmp_path / "stream.wav"
    soundfile.write(path, tone(16000), 16000)
    content = bytearray(path.read_bytes())
    content[4:8] = b"\xff" * 4
    path.write_bytes(content)
    np.testing.assert_allclose(audio.read_audio(str(path)), tone(16000), atol=1e-4)


def dataset(*paths):
    records = {"audio": [str(path) for path in paths], "targets": [[3]] * len(paths)}
    return load_audio()(tf.data.Dataset.from_tensor_slices(records))


def test_a_pipeline_gives_the_frames_of_its_files(tmp_path):
    paths = [tmp_path / "short.wav", tmp_path / "long.flac"]
    for path, num_samples in zip(paths, (4000, 9000), strict=True):
        soundfile.write(path, tone(num_samples), 16000)
    found = list(dataset(*paths).as_numpy_iterator())
    for example, path in zip(found, paths, strict=True):
        assert example.keys() == {"inputs", "targets"} and example["targets"].tolist() == [3]
        np.testing.assert_array_equal(example["inputs"], audio.frames(audio.read_audio(str(path))))
    (batch,) = dataset(*paths).padded_batch(2).as_numpy_iterator()
    assert batch["inputs"].shape == (2, 27, 161)
    assert batch["inputs"][..., 0].sum(-1).tolist() == [11, 27]  # padding is marked as such


def test_a_pipeline_stops_at_an_unreadable_file_and_names_it(tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    with pytest.raises(tf.errors.OpError, match=r"bad\.wav"):
        list(dataset(tmp_path / "bad.wav"))
