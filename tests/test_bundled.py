"""The checkpoints and the vocabulary that come with the package."""

import numpy as np
import pytest
import seqio

from coda_jax import batches as batches_lib
from coda_jax import bundled, checkpoints, data, models, runs, training
from coda_jax.tasks import audio, offline, offline_speech  # noqa: F401 (register the tasks)

TEXT = {"dense": bundled.DENSE, "coda": bundled.CODA}
SPEECH = {"dense speech": bundled.DENSE_SPEECH, "coda speech": bundled.CODA_SPEECH}
FOLDERS = TEXT | SPEECH


@pytest.mark.parametrize("name", FOLDERS)
def test_each_is_small_and_has_a_card(name):
    folder = FOLDERS[name]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 10e6
    card = (folder / "README.md").read_text()
    for word in ("Data", "Steps", "Final loss", "Command", "Licence"):
        assert word in card


@pytest.mark.parametrize("name", TEXT)
def test_each_for_text_has_its_vocabulary(name):
    vocabulary = (bundled.VOCABULARY / "spiece.model").read_bytes()
    assert (TEXT[name] / "spiece.model").read_bytes() == vocabulary


@pytest.mark.parametrize("name", FOLDERS)
def test_each_loads_in_transformers(name, rng):
    torch = pytest.importorskip("torch", reason="the live comparison needs torch")
    transformers = pytest.importorskip("transformers", reason="and transformers")
    config, params = checkpoints.load_hf(FOLDERS[name])
    targets = rng.integers(3, 300, (2, 5))
    decoder_inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    theirs = {"decoder_input_ids": torch.tensor(decoder_inputs)}
    if name in TEXT:
        family = transformers.T5ForConditionalGeneration
        inputs = rng.integers(3, 3000, (2, 20))
        theirs["input_ids"] = torch.tensor(inputs)
    else:
        family = transformers.Wav2Vec2BertForCTC
        recordings = [offline_speech.spoken_digits("spoken_digits", "test", i)[0] for i in range(2)]
        inputs = np.stack([audio.frames(samples)[:100] for samples in recordings])
        theirs = {"input_features": torch.tensor(inputs[..., 1:])}
    reference = family.from_pretrained(FOLDERS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(**theirs).logits.numpy()
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": decoder_inputs,
        "decoder_target_tokens": targets,
    }
    found = models.for_config(config).logits(params, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def exact_match(model, task, lengths, count=160):
    """Of validation examples of a pretraining task, how many are answered without a mistake."""
    examples = data.seqio_examples(
        task, "validation", feature_lengths=lengths, seed=0, shuffle=True, num_epochs=1
    )
    batches = batches_lib.batch_examples(
        (example for _, example in zip(range(count), examples, strict=False)),
        batch_size=32,
        feature_lengths=lengths,
    )
    metrics = training.evaluate(
        models.for_config(model.config), model.params, batches, training.Placement()
    )
    return metrics["exact_match"]


@pytest.mark.parametrize(
    "dense, coda, task, lengths",
    [
        (bundled.DENSE, bundled.CODA, "stdlib_summary", (128, 32)),
        (bundled.DENSE_SPEECH, bundled.CODA_SPEECH, "spoken_digits_clean", (150, 6)),
    ],
)
def test_both_know_what_they_were_taught_and_a_random_one_does_not(dense, coda, task, lengths):
    lengths = dict(zip(("inputs", "targets"), lengths, strict=True))
    loaded = runs.load_model(str(dense))
    routed = runs.load_model(str(coda), adapter_checkpoint=str(coda / "adapter"))
    random = runs.load_model(config=loaded.config)
    assert exact_match(loaded, task, lengths) > 0.5
    assert exact_match(routed, task, lengths) > 0.5
    assert exact_match(random, task, lengths) == 0


def test_the_vocabulary_has_as_many_ids_as_the_checkpoints():
    vocabulary = data.load_vocabulary(bundled.DENSE)
    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
    config, _ = checkpoints.load_hf(bundled.DENSE)
    assert vocabulary.vocab_size == config.vocab_size == 4096
