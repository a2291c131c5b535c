"""The programs of a T5 Base with CoDA lower for TPU: nothing in them is for CPU or GPU only."""

import jax
import jax.numpy as jnp
import optax
import pytest

from coda_jax.methods import Coda, ParallelAdapter, partition
from coda_jax.models import preset
from coda_jax.objectives import model_for
from coda_jax.training import steps

LENGTH, TARGETS, BATCH = 512, 16, 8


@pytest.fixture(scope="module")
def model():
    """With one layer of each kind instead of twelve, which are alike."""
    cfg = preset("t5_1_1_base", dtype=jnp.bfloat16, dropout_rate=0.0)
    methods = (Coda(3, max_segments=4), ParallelAdapter())
    return model_for(cfg.replace(num_encoder_layers=1, num_decoder_layers=1, methods=methods))


@pytest.fixture(scope="module")
def params(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def tokens(length):
    return jax.ShapeDtypeStruct((BATCH, length), jnp.int32)


def lower(function, *arguments):
    """The text of the program for TPU."""
    return jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()


@pytest.mark.all
def test_the_training_step_of_packed_rows_lowers(model, params):
    batch = {
        "encoder_input_tokens": LENGTH,
        "encoder_segment_ids": LENGTH,
        "encoder_positions": LENGTH,
        "decoder_input_tokens": TARGETS,
        "decoder_target_tokens": TARGETS,
        "decoder_loss_weights": TARGETS,
        "decoder_segment_ids": TARGETS,
        "decoder_positions": TARGETS,
    }
    trained, frozen = partition(model.config, params)
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(
        lambda t: steps.TrainState(jnp.zeros((), jnp.int32), t, optimizer.init(t)), trained
    )
    step = steps.make_train_step(model, optimizer, 1, 0)
    text = lower(step, state, frozen, {name: tokens(length) for name, length in batch.items()})
    # k-to-k attention over K = ceil(512 / 3) + 3 slots, and nothing of all pairs for each head.
    assert "8x12x174x174x" in text and "12x512x512x" not in text


@pytest.mark.parametrize("num_beams", [1, 4])
def test_prediction_lowers_without_the_product_that_is_for_cpu(num_beams, model, params):
    def predict(params, inputs):
        return model.predict(params, inputs, max_decode_length=TARGETS, num_beams=num_beams)

    text = lower(predict, params, tokens(LENGTH))
    assert "stablehlo.while" in text
    assert "tensor<48x16x768xbf16>" not in text  # the blocks of `nn.layers._blocked_product`
