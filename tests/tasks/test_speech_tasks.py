"""LibriSpeech and folders of recordings as seqio tasks."""

from pathlib import Path
import shutil

import captcha
import numpy as np
import pytest
import seqio
import tensorflow as tf

from coda_jax.data import audio
from coda_jax.data.seqio_tasks import seqio_examples
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


def clips(folder, count):
    """Copies of captcha's recordings in folders, two of them no recordings."""
    for i, clip in enumerate(sorted(CLIPS.glob("?/*.wav")) * 3):
        if i < count:
            place = folder / f"speaker{i % 3}" / f"{i}.WAV"
            place.parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(clip, place)
    (folder / "notes.txt").write_text("no recording")
    (folder / ".hidden.wav").write_text("no recording")
    return str(folder)


def paths(name, split):
    source = seqio.get_mixture_or_task(name).source
    return {Path(x["audio"].decode()) for x in source.get_dataset(split, shuffle=False)
            .as_numpy_iterator()}  # fmt: skip


def test_recordings_without_transcripts_are_split_by_their_names(tmp_path):
    folder = clips(tmp_path / "one", 100)
    name = speech.recordings(folder, "bytes")
    assert speech.recordings(folder, "bytes") == name
    train, validation = (paths(name, split) for split in ("train", "validation"))
    assert len(train) == 100 - len(validation) and 0 < len(validation) < 15
    shutil.copytree(folder, tmp_path / "two")
    moved = paths(speech.recordings(str(tmp_path / "two"), "bytes"), "validation")
    assert {x.relative_to(tmp_path / "two") for x in moved} == {
        x.relative_to(folder) for x in validation
    }
    task = seqio.get_mixture_or_task(name)
    example = next(task.get_dataset(LENGTHS, "train", shuffle=False).as_numpy_iterator())
    assert example["inputs"].shape[1] == 161 and example["targets"].tolist() == [1]
    assert not task.metric_fns


def test_recordings_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match=r"RECORDINGS='.*a': there are no files that end"):
        speech.recordings(str(tmp_path / "a"), "bytes")
    (tmp_path / "a" / "x.wav").touch()
    with pytest.raises(ValueError, match="every file is empty"):
        speech.recordings(str(tmp_path / "a"), "bytes")
    (tmp_path / "a" / "x.wav").write_bytes(b"RIFF of nothing")
    name = speech.recordings(str(tmp_path / "a"), "bytes")
    said = []
    for split in ("train", "validation"):
        with pytest.raises(ValueError) as error:
            reading = {"feature_lengths": LENGTHS, "seed": 0, "shuffle": False, "num_epochs": 1}
            next(seqio_examples(name, split, **reading))
        said.append(str(error.value))
    named, none = sorted(said, key=lambda text: "none of 1 files" in text)
    assert "x.wav" in named and "none of 1 files is in the split" in none
    assert len(named.splitlines()) == len(none.splitlines()) == 1
