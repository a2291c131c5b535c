"""The loss and the counts of sequence to sequence, and how a model routes."""

import functools

from helpers import config, logits, random_params, random_tokens, shift_right
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.data.batches import INCOMPLETE
from coda_jax.objectives import Seq2Seq
from coda_jax.objectives.base import LOSS

CONFIG = config(coda={"reduction": 2.0}, num_encoder_layers=1)


@pytest.fixture
def batch(rng):
    """Three rows, the last of them empty."""
    inputs, targets = random_tokens(rng, [8, 5, 0], 8), random_tokens(rng, [4, 2, 0], 4)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shift_right(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


def expected(params, batch):
    """The log-probabilities of each target position's tokens, in float64."""
    found = logits(CONFIG, params, *[batch[k] for k in list(batch)[:3]])
    found = np.asarray(found, np.float64)
    return found, found - np.log(np.exp(found).sum(-1, keepdims=True))


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_loss_is_the_weighted_cross_entropy(batch, z_loss):
    params = random_params(CONFIG)
    loss, sums = jax.jit(Seq2Seq(CONFIG, z_loss).loss)(params, batch)
    found, log_probs = expected(params, batch)
    total = 0.0
    for row, column in zip(*np.nonzero(batch["decoder_loss_weights"]), strict=True):
        total -= log_probs[row, column, batch["decoder_target_tokens"][row, column]]
        total += z_loss * np.log(np.exp(found[row, column]).sum()) ** 2
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert (sums.weight, sums.examples) == (6, 2)
    np.testing.assert_allclose(LOSS.of(sums), total / 6, rtol=1e-5)


def test_exact_counts_rows_whose_every_token_is_the_most_probable(batch):
    params = random_params(CONFIG)
    model = Seq2Seq(CONFIG)
    # Give the model's own greedy answers as targets of the first row: only that one is exact.
    predict = jax.jit(functools.partial(model.predict, max_decode_length=4))
    answer = np.asarray(predict(params, batch["encoder_input_tokens"][:1]))
    targets = batch["decoder_target_tokens"].copy()
    targets[0] = answer[0]
    batch |= {"decoder_target_tokens": targets, "decoder_input_tokens": shift_right(targets)}
    batch["decoder_loss_weights"] = (targets > 0).astype(np.int32)
    _, log_probs = expected(params, batch)
    right = (log_probs.argmax(-1) == targets) & (targets > 0)
    _, sums = jax.jit(model.loss)(params, batch)
    assert sums.correct == right.sum()
    assert sums.exact == sum(right[i].sum() == (targets[i] > 0).sum() > 0 for i in range(3))
    assert sums.exact >= 1
    cut = {**batch, INCOMPLETE: np.array([True, False, False])}
    _, marked = jax.jit(model.loss)(params, cut)
    assert marked.exact == sums.exact - 1
    assert (marked.loss, marked.correct) == (sums.loss, sums.correct)


def test_routing_has_the_weights_of_the_tokens_that_a_layer_takes(batch):
    params = random_params(CONFIG)
    routing = jax.jit(Seq2Seq(CONFIG).routing)
    weights = np.asarray(routing(params, batch["encoder_input_tokens"]))
    assert weights.shape == (1, 3, 8)
    np.testing.assert_array_equal((weights > 0).sum(-1), [[4, 3, 0]])
    assert (weights[:, batch["encoder_input_tokens"] == 0] == 0).all()
    dense = CONFIG.dense()
    routing = jax.jit(Seq2Seq(dense).routing)
    weights = routing(random_params(dense), batch["encoder_input_tokens"])
    np.testing.assert_array_equal(weights[0], batch["encoder_input_tokens"] > 0)


@pytest.mark.all
def test_dropout_needs_an_rng_and_changes_the_loss(batch):
    cfg = CONFIG.replace(dropout_rate=0.5)
    model, params = Seq2Seq(cfg), random_params(cfg)
    loss = jax.jit(model.loss)
    losses = [loss(params, batch, rng)[0] for rng in (None, jax.random.key(0))]
    assert jnp.isfinite(jnp.array(losses)).all()
    assert losses[0] != losses[1]
