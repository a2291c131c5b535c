"""CTC: loss and search against all alignments, PyTorch and TensorFlow; the model's sums."""

import collections
import functools
import itertools

from helpers import TINY_SPEECH, config, random_frames, random_params, random_tokens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.data.batches import INCOMPLETE
from coda_jax.inference import Decoding, Predictor
from coda_jax.objectives import CTC, Seq2Seq, model_for
from coda_jax.objectives.ctc import ctc_beam_search, ctc_greedy, ctc_loss

CONFIG = config({"reduction": 2}, base=TINY_SPEECH, num_encoder_layers=1)
loss_of = jax.jit(ctc_loss, static_argnums=4)


@functools.cache
def compiled(method, **kwargs):
    """A method of the model."""
    return jax.jit(functools.partial(getattr(CTC(CONFIG), method), **kwargs))


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
    found = loss_of(logits, mask, targets, target_mask, blank_id)
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


def transcripts(log_probs, blank_id):
    """{tokens: probability} over all alignments of the frames [N, V]."""
    length, vocab_size = log_probs.shape
    found = collections.Counter()
    for alignment in itertools.product(range(vocab_size), repeat=length):
        probability = np.exp(log_probs[np.arange(length), list(alignment)].sum())
        found[tuple(collapsed(alignment, blank_id))] += probability
    return found


def beams_of(tokens, scores, blank_id):
    """{tokens: log probability} of one row of `ctc_beam_search`, in its order."""
    found = {
        tuple(t for t in row if t != blank_id): score
        for row, score in zip(tokens.tolist(), scores.tolist(), strict=True)
        if np.isfinite(score)
    }
    assert len(found) == np.isfinite(scores).sum()  # no transcript twice
    return found


@pytest.mark.parametrize("blank_id", [0, 2])
def test_with_beams_enough_the_search_finds_every_transcript_and_its_probability(blank_id, rng):
    lengths = [5, 3, 1, 0]
    logits = 2 * rng.normal(size=(4, 5, 3)).astype(np.float32)
    mask = np.arange(5) < np.array(lengths)[:, None]
    search = jax.jit(ctc_beam_search, static_argnums=(2, 3))
    tokens, scores = map(np.asarray, search(logits, mask, 64, blank_id))
    for row, length in enumerate(lengths):
        log_probs = np.asarray(jax.nn.log_softmax(logits[row, :length]), np.float64)
        expected = transcripts(log_probs, blank_id)
        found = beams_of(tokens[row], scores[row], blank_id)
        assert found.keys() == expected.keys()
        for transcript, score in found.items():
            np.testing.assert_allclose(np.exp(score), expected[transcript], rtol=1e-4)
        assert (np.diff(list(found.values())) <= 0).all()


@pytest.mark.parametrize("num_beams", [1, 2, 8])
def test_search_finds_what_that_of_tensorflow_does(num_beams, rng):
    """Whose blank is the last token; where two beams are equally good the choice is open."""
    tf = pytest.importorskip("tensorflow")
    logits = 3 * rng.normal(size=(6, 20, 7)).astype(np.float32)
    lengths = rng.integers(1, 21, 6)
    mask = np.arange(20) < lengths[:, None]
    search = jax.jit(ctc_beam_search, static_argnums=(2, 3))
    tokens, scores = map(np.asarray, search(logits, mask, num_beams, 6))
    theirs, their_scores = tf.nn.ctc_beam_search_decoder(
        tf.constant(logits.transpose(1, 0, 2)), lengths, beam_width=num_beams, top_paths=1
    )
    expected = tf.sparse.to_dense(theirs[0], default_value=6).numpy()
    for row in range(6):
        assert [t for t in tokens[row, 0] if t != 6] == [t for t in expected[row] if t != 6]
    np.testing.assert_allclose(scores[:, 0], their_scores.numpy()[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.all
def test_beams_find_transcripts_at_least_as_probable_as_the_best_alignment_has(rng):
    params = random_params(CONFIG)
    frames = random_frames(rng, [12, 6, 9], 12)
    logits = compiled("logits")(params, {"encoder_input_tokens": frames})
    losses = {}
    for num_beams in (1, 6):
        predict = compiled("predict", max_decode_length=12, num_beams=num_beams)
        tokens = predict(params, frames)
        losses[num_beams] = loss_of(logits, frames[..., 0] > 0, tokens, tokens > 0)
    assert (losses[6] <= losses[1] + 1e-5).all() and (losses[6] < losses[1]).any()


def batch_of(frames, targets):
    """A batch, as the trainer has it."""
    return {
        "encoder_input_tokens": frames,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


def test_sums_count_target_tokens_and_exact_transcripts(rng):
    """With the model's own transcript as a target, which is exact, and a filler row."""
    params = random_params(CONFIG)
    frames = random_frames(rng, [12, 6, 0], 12)
    own = np.asarray(compiled("predict", max_decode_length=12, num_beams=1)(params, frames))
    assert (own[0] > 0).sum() > 1 and not own[2].any()
    targets = random_tokens(rng, [0, 2, 0], 12)
    targets[0] = own[0]
    batch = batch_of(frames, targets)
    loss, sums = compiled("loss")(params, batch)
    logits = compiled("logits")(params, {"encoder_input_tokens": frames})
    expected = loss_of(logits, frames[..., 0] > 0, targets, targets > 0)
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-6)
    assert expected[2] == 0
    assert sums.weight == (targets > 0).sum() and sums.examples == 2
    right = ((own == targets) & (targets > 0)).sum()
    assert sums.correct == right and sums.exact == 1 + (own[1] == targets[1]).all()
    _, marked = compiled("loss")(params, {**batch, INCOMPLETE: np.array([True, False, False])})
    assert marked.exact == sums.exact - 1 and marked.correct == right


@pytest.mark.parametrize(("targets", "frames"), [([5, 6, 1], 2), ([5, 5, 1], 3), ([1], 1)])
def test_an_example_with_too_few_frames_cannot_be_learned(targets, frames, rng):
    """It is known before: the loss would be infinite."""
    model, targets = CTC(CONFIG), np.array(targets)
    assert model.misfit(random_frames(rng, [frames], frames)[0], targets) is None
    few = random_frames(rng, [frames - 1], frames)
    expected = f"its {frames - 1} frames are too few for its {len(targets) - 1} target tokens"
    assert (model.misfit(few[0, :-1], targets) == expected) == (len(targets) > 1)
    loss, _ = compiled("loss")(random_params(CONFIG), batch_of(few, targets[None]))
    assert np.isinf(loss) == (len(targets) > 1)


def test_eos_at_the_end_of_a_target_is_not_learned(rng):
    """A decoder needs it to stop; between frames it would have no place of its own."""
    params = random_params(CONFIG)
    frames = random_frames(rng, [12, 6, 0], 12)
    targets = random_tokens(rng, [3, 1, 0], 12)
    ended = targets.copy()
    ended[[0, 1], [3, 1]] = 1
    loss = compiled("loss")
    found, expected = (loss(params, batch_of(frames, tokens))[1] for tokens in (ended, targets))
    assert found == expected and found.weight == 4


def test_predictions_do_not_depend_on_what_else_is_asked(rng):
    """Through the predictor, which batches inputs of similar lengths and pads them."""
    params = random_params(CONFIG)
    utterances = [random_frames(rng, [n], n)[0] for n in (9, 31, 3, 30)]
    decoding = Decoding(max_input_length=32, max_decode_length=20, batch_size=2)
    predictor = Predictor(CONFIG, params, decoding)
    together = dict(predictor(utterances))
    for index, utterance in enumerate(utterances):
        ((_, alone),) = predictor([utterance])
        np.testing.assert_array_equal(together[index], alone)
    assert together[1].any()


def test_what_ctc_lacks_is_refused():
    model = CTC(CONFIG)
    with pytest.raises(ValueError, match=r"'ctc' has no option \['z_loss'\]: .*0\.1"):
        model_for(CONFIG, z_loss=0.1)
    with pytest.raises(ValueError, match="vocab_size=0 must be above 0"):
        model_for(CONFIG.replace(vocab_size=0))
    with pytest.raises(ValueError, match="pack=False"):
        model.loss({}, {"encoder_segment_ids": np.ones((1, 3))})
    with_decoder = CONFIG.replace(num_decoder_layers=1)
    assert isinstance(model_for(with_decoder, z_loss=0.1), Seq2Seq)
