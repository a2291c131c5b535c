"""The checkpoints and the vocabulary that come with the package."""

import numpy as np
import pytest
import seqio

from coda_jax import batches as batches_lib
from coda_jax import bundled, checkpoints, data, runs, training
from coda_jax.models import EncoderDecoder
from coda_jax.tasks import offline  # noqa: F401 (registers the tasks)

FOLDERS = {"dense": bundled.DENSE, "coda": bundled.CODA}


@pytest.mark.parametrize("name", FOLDERS)
def test_each_is_small_has_its_vocabulary_and_a_card(name):
    folder = FOLDERS[name]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 10e6
    vocabulary = (bundled.VOCABULARY / "spiece.model").read_bytes()
    assert (folder / "spiece.model").read_bytes() == vocabulary
    card = (folder / "README.md").read_text()
    for word in ("Data", "Steps", "Final loss", "Command", "Licence"):
        assert word in card


@pytest.mark.parametrize("name", FOLDERS)
def test_each_loads_in_transformers(name):
    torch = pytest.importorskip("torch", reason="the live comparison needs torch")
    transformers = pytest.importorskip("transformers", reason="and transformers")
    config, params = checkpoints.load_hf(FOLDERS[name])
    reference = transformers.T5ForConditionalGeneration.from_pretrained(
        FOLDERS[name], dtype=torch.float32
    ).eval()
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(3, 3000, (2, 20)), rng.integers(3, 3000, (2, 5))
    decoder_inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(inputs), decoder_input_ids=torch.tensor(decoder_inputs)
        ).logits.numpy()
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": decoder_inputs,
        "decoder_target_tokens": targets,
    }
    found = EncoderDecoder(config).logits(params, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def exact_match(model):
    """Of 160 validation examples of a pretraining task: whose file is this function from?"""
    lengths = {"inputs": 128, "targets": 32}
    examples = data.seqio_examples(
        "stdlib_summary", "validation", feature_lengths=lengths, seed=0, shuffle=True, num_epochs=1
    )
    batches = batches_lib.batch_examples(
        (example for _, example in zip(range(160), examples, strict=False)),
        batch_size=32,
        feature_lengths=lengths,
    )
    metrics = training.evaluate(
        EncoderDecoder(model.config), model.params, batches, training.Placement()
    )
    return metrics["exact_match"]


def test_both_know_what_they_were_taught_and_a_random_one_does_not():
    dense = runs.load_model(str(bundled.DENSE))
    coda = runs.load_model(str(bundled.CODA), adapter_checkpoint=str(bundled.CODA / "adapter"))
    random = runs.load_model(config=dense.config)
    assert exact_match(dense) > 0.5
    assert exact_match(coda) > 0.5
    assert exact_match(random) == 0


def test_the_vocabulary_has_as_many_ids_as_the_checkpoints():
    vocabulary = data.load_vocabulary(bundled.DENSE)
    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
    config, _ = checkpoints.load_hf(bundled.DENSE)
    assert vocabulary.vocab_size == config.vocab_size == 4096
