"""CTC: the loss against all alignments and PyTorch, greedy decoding, and the model's sums."""

import functools
import itertools

from helpers import TINY_SPEECH, config, random_frames, random_params, random_tokens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import models
from coda_jax.ctc import ctc_greedy, ctc_loss
from coda_jax.inference import Decoding, Predictor

CONFIG = config({"reduction": 2}, base=TINY_SPEECH, num_encoder_layers=1)


def collapsed(alignment, blank_id):
    """The tokens of an alignment: equal neighbours become one, blanks go."""
    return [token for token, _ in itertools.groupby(alignment) if token != blank_id]


@pytest.mark.parametrize("blank_id", [0, 2])
def test_loss_is_that_of_all_alignments_together(blank_id, rng):
    logits = rng.normal(size=(4, 4, 3)).astype(np.float32)
    targets = np.array([[1, 1], [1, 0], [0, 0], [1, 1]])
    targets[blank_id == targets] = 2 - blank_id
    lengths, target_lengths = [4, 3, 2, 0], [2, 1, 0, 0]
    mask = np.arange(4) < np.array(lengths)[:, None]
    target_mask = np.arange(2) < np.array(target_lengths)[:, None]
    found = jax.jit(ctc_loss, static_argnums=4)(logits, mask, targets, target_mask, blank_id)
    for row, length in enumerate(lengths):
        log_probs = np.asarray(jax.nn.log_softmax(logits[row, :length]), np.float64)
        wanted = targets[row, : target_lengths[row]].tolist()
        total = sum(
            np.exp(log_probs[np.arange(length), list(alignment)].sum())
            for alignment in itertools.product(range(3), repeat=length)
            if collapsed(alignment, blank_id) == wanted
        )
        np.testing.assert_allclose(found[row], -np.log(total), rtol=1e-5, atol=1e-5)


def test_loss_and_gradient_equal_those_of_pytorch(rng):
    """Also where no alignment is possible: two equal targets need three frames."""
    torch = pytest.importorskip("torch")
    logits = rng.normal(size=(4, 9, 6)).astype(np.float32)
    targets = np.array([[1, 2, 2, 5], [3, 3, 0, 0], [4, 0, 0, 0], [3, 3, 0, 0]])
    lengths, target_lengths = np.array([9, 4, 1, 2]), np.array([4, 2, 1, 2])
    mask, target_mask = (
        np.arange(n) < size[:, None] for n, size in ((9, lengths), (4, target_lengths))
    )
    theirs = torch.tensor(logits, requires_grad=True)
    losses = torch.nn.functional.ctc_loss(
        theirs.log_softmax(-1).transpose(0, 1), torch.tensor(targets), torch.tensor(lengths),
        torch.tensor(target_lengths), reduction="none",
    )  # fmt: skip

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def ours(logits):
        losses = ctc_loss(logits, mask, targets, target_mask)
        return losses[:3].sum(), losses

    gradient, found = ours(jnp.asarray(logits))
    np.testing.assert_allclose(found, losses.detach().numpy(), rtol=1e-5)
    assert np.isinf(found[3]) and np.isfinite(found[:3]).all()
    losses[:3].sum().backward()
    np.testing.assert_allclose(gradient[:3], theirs.grad[:3], atol=1e-5)
    assert not gradient[3].any()


@pytest.mark.parametrize("blank_id", [0, 2])
def test_greedy_tokens_are_those_of_the_best_alignment(blank_id, rng):
    logits = rng.normal(size=(50, 7, 3)).astype(np.float32)
    lengths = rng.integers(0, 8, 50)
    found = np.asarray(ctc_greedy(jnp.asarray(logits), np.arange(7) < lengths[:, None], blank_id))
    for row, length in enumerate(lengths):
        tokens = collapsed(logits[row, :length].argmax(-1).tolist(), blank_id)
        assert found[row].tolist() == tokens + [blank_id] * (7 - len(tokens))


def test_sums_count_target_tokens_and_exact_transcripts(rng):
    """With the model's own transcript as a target, which is exact, and a filler row."""
    model, params = models.CTC(CONFIG), random_params(CONFIG)
    frames = random_frames(rng, [12, 6, 0], 12)
    predict = jax.jit(functools.partial(model.predict, max_decode_length=12))
    own = np.asarray(predict(params, frames))
    assert (own[0] > 0).sum() > 1 and not own[2].any()
    targets = random_tokens(rng, [0, 2, 0], 12)
    targets[0] = own[0]
    batch = {
        "encoder_input_tokens": frames,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }
    loss, sums = jax.jit(model.loss)(params, batch)
    logits = jax.jit(model.logits)(params, batch)
    expected = jax.jit(ctc_loss)(logits, frames[..., 0] > 0, targets, targets > 0)
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-6)
    assert expected[2] == 0
    assert sums.weight == (targets > 0).sum() and sums.examples == 2
    right = ((own == targets) & (targets > 0)).sum()
    assert sums.correct == right and sums.exact == 1 + (own[1] == targets[1]).all()


def test_eos_at_the_end_of_a_target_is_not_learned(rng):
    """A decoder needs it to stop; between frames it would have no place of its own."""
    model, params = models.CTC(CONFIG), random_params(CONFIG)
    targets = random_tokens(rng, [3, 1], 4)
    ended = targets.copy()
    ended[[0, 1], [3, 1]] = 1
    loss = jax.jit(model.loss)
    found, expected = (
        loss(
            params,
            {
                "encoder_input_tokens": random_frames(np.random.default_rng(0), [12, 6], 12),
                "decoder_target_tokens": tokens,
                "decoder_loss_weights": (tokens > 0).astype(np.int32),
            },
        )[1]
        for tokens in (ended, targets)
    )
    assert found == expected and found.weight == 4


def test_predictions_do_not_depend_on_what_else_is_asked(rng):
    """Through the predictor, which batches inputs of similar lengths and pads them."""
    params = random_params(CONFIG)
    utterances = [random_frames(rng, [n], n)[0] for n in (9, 31, 3, 30)]
    decoding = Decoding(max_input_length=32, max_decode_length=20, batch_size=2)
    predictor = Predictor(models.for_config(CONFIG), params, decoding)
    together = dict(predictor(utterances))
    for index, utterance in enumerate(utterances):
        ((_, alone),) = predictor([utterance])
        np.testing.assert_array_equal(together[index], alone)
    assert together[1].any()


def test_what_ctc_lacks_is_refused(rng):
    model, frames = models.CTC(CONFIG), random_frames(rng, [3], 3)
    with pytest.raises(ValueError, match="num_beams=4 must be 1"):
        model.predict({}, frames, max_decode_length=4, num_beams=4)
    with pytest.raises(ValueError, match=r"z_loss=0\.1"):
        models.for_config(CONFIG, z_loss=0.1)
    with pytest.raises(ValueError, match="vocab_size=0 must be above 0"):
        models.for_config(CONFIG.replace(vocab_size=0))
    with pytest.raises(ValueError, match="pack=False"):
        model.loss({}, {"encoder_segment_ids": np.ones((1, 3))})
    with_decoder = CONFIG.replace(num_decoder_layers=1)
    assert isinstance(models.for_config(with_decoder, 0.1), models.EncoderDecoder)
