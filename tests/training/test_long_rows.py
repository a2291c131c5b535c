"""A step on one packed row of 16,384 tokens."""

from helpers import config, random_params
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coda_jax import trees
from coda_jax.data.batches import batch_examples
from coda_jax.methods import Coda, ParallelAdapter, partition
from coda_jax.objectives.seq2seq import Seq2Seq
from coda_jax.training import steps

LENGTHS = {"inputs": 16384, "targets": 2304}
NUM_EXAMPLES = 40


@pytest.mark.all
@pytest.mark.parametrize("methods", [(), (Coda(3.0, attention="k_to_all", max_segments=40),)])
def test_a_step_on_a_packed_row_is_that_on_its_examples_alone(methods, rng):
    """The loss, and every trained leaf afterwards, of rows so short that they take arrays."""
    cfg = config(num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.0)
    cfg = cfg.replace(methods=(*methods, ParallelAdapter(4)))
    sizes = {"inputs": (300, 500), "targets": (20, 57)}
    examples = [
        {key: rng.integers(2, cfg.vocab_size, rng.integers(*size)) for key, size in sizes.items()}
        for _ in range(NUM_EXAMPLES)
    ]
    found = []
    for batch_size, pack in ((1, True), (NUM_EXAMPLES, False)):
        (batch,) = batch_examples(
            examples, batch_size=batch_size, feature_lengths=LENGTHS, pack=pack
        )
        assert batch["encoder_input_tokens"].shape == ((1, 16384) if pack else (40, 512))
        trained, frozen = partition(cfg, random_params(cfg))
        optimizer = optax.sgd(1.0)
        state = steps.TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
        step = steps.make_train_step(Seq2Seq(cfg), optimizer, accumulation=1, seed=0)
        state, sums = step(state, frozen, batch)
        found.append((trees.flatten(jax.device_get(state.trained)), float(sums.loss / sums.weight)))
    (packed, loss), (alone, loss_alone) = found
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
    before = trees.flatten(partition(cfg, random_params(cfg))[0])
    for path, leaf in packed.items():
        np.testing.assert_allclose(leaf, alone[path], rtol=1e-3, atol=1e-4, err_msg=path)
        assert not np.array_equal(leaf, before[path]), path
