"""LibriSpeech and folders of recordings as seqio tasks."""

from pathlib import Path
import shutil

import captcha
import numpy as np
import pytest
import seqio
import tensorflow as tf

from coda_jax.data import audio
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.tasks import speech

CLIPS = Path(captcha.__file__).parent / "data"
LENGTHS = {"inputs": 200, "targets": 16}


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
    """Two of captcha's clips with the digits that they say."""
    rows = ["path\tsentence\tage"]
    for digit in "73":
        clip = sorted((CLIPS / digit).glob("*.wav"))[0]
        shutil.copy(clip, tmp_path / f"{digit}.wav")
        rows.append(f'{digit}.wav\tIt\'s "{digit}"\t30')
    (tmp_path / "train.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_folder_is_read_with_its_transcripts(folder):
    name = speech.task("audio_folder", "bytes", str(folder))
    assert speech.task("audio_folder", "bytes", str(folder)) == name
    task = seqio.get_mixture_or_task(name)
    first, second = task.get_dataset(LENGTHS, "train", shuffle=False).as_numpy_iterator()
    expected = audio.frames(audio.read_audio(str(folder / "7.wav")))
    np.testing.assert_array_equal(first["inputs"], expected)
    vocabulary = ByteVocabulary()
    assert second["targets"].tolist() == [*vocabulary.encode('it\'s "3"'), 1]
    assert task.metric_fns[0](["it's seven"], ["it's heaven"])["wer"] == 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\ttext\na.wav\thello\n", r"train\.tsv:1: no column \['sentence'\]"),
        ("path\tsentence\na.wav\thello\nb.wav\n", r"train\.tsv:3: no \['path', 'sentence'\]"),
        ("path\tsentence\n", r"train\.tsv: there are no recordings"),
        ("", r"train\.tsv:1: no column \['path', 'sentence'\]"),
    ],
)
def test_a_bad_table_is_named_with_its_line(text, message, tmp_path):
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        speech.read_folder(str(tmp_path), "train")


def test_a_missing_table_and_a_missing_recording_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"test\.tsv"):
        speech.read_folder(str(folder), "test")
    (folder / "7.wav").unlink()
    task = seqio.get_mixture_or_task(speech.task("audio_folder", "bytes", str(folder)))
    with pytest.raises(tf.errors.OpError, match=r"no audio file .*7\.wav"):
        next(task.get_dataset(LENGTHS, "train", shuffle=False).as_numpy_iterator())


def test_records_of_librispeech_become_frames_and_lower_case():
    """The schema of TFDS: 16-bit samples as int64, and capitals."""
    samples = (3000 * np.sin(np.arange(16000) / 9)).astype(np.int64)
    records = tf.data.Dataset.from_tensors({"speech": samples, "text": "HE LAUGHED", "id": "1-2"})
    (found,) = speech.from_librispeech(records).as_numpy_iterator()
    expected = audio.frames((samples / 2**15).astype(np.float32))
    np.testing.assert_allclose(found["inputs"], expected, atol=1e-4)
    assert found["targets"] == b"he laughed"


@pytest.mark.parametrize("variant", speech.LIBRISPEECH_SPLITS)
def test_librispeech_has_the_splits_of_tfds(variant):
    from tensorflow_datasets.datasets.librispeech import librispeech_dataset_builder as tfds_module

    known = {
        f"{split}_{name}"
        for split in ("dev", "test", "train")
        for name in ("clean", "other", "clean100", "clean360", "other500")
    }
    splits = speech.LIBRISPEECH_SPLITS[variant]
    assert tuple(splits) == speech.SPLITS
    assert set("+".join(splits.values()).split("+")) <= known
    version = str(tfds_module.Builder.VERSION)
    assert f"librispeech:{version}" == speech.LIBRISPEECH
    seqio.get_mixture_or_task(speech.task(f"librispeech_{variant}", "bytes"))


def test_names_and_directories_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no speech task 'librispeech'"):
        speech.task("librispeech", "bytes")
    with pytest.raises(ValueError, match="needs a directory, got None"):
        speech.task("audio_folder", "bytes")
    with pytest.raises(ValueError, match="reads no directory, got 'x'"):
        speech.task("librispeech_clean", "bytes", "x")
