"""Three training steps of a tiny model, plain or under T5X's partitioner; a program that prints."""

import json

from flax.core import freeze
from helpers import config, pack, random_params, shapes, shift_right
import jax
import numpy as np
import optax
import seqio
from t5x import partitioning, train_state

from coda_jax.t5x_models import CodaEncoderDecoderModel

CONFIG = config(coda={"reduction": 2.0, "max_segments": 2}, vocab_size=32)


def rows(rng, lengths, num_tokens):
    """Two examples in each row: (tokens, segment ids)."""
    many = [pack([rng.integers(2, 32, n) for n in pair], num_tokens) for pair in lengths]
    tokens, segments = zip(*many, strict=True)
    return np.concatenate(tokens), np.concatenate(segments)


def make_batch():
    """Eight packed rows."""
    rng = np.random.default_rng(0)
    inputs, input_segments = rows(rng, rng.integers(2, 7, (8, 2)), 12)
    targets, target_segments = rows(rng, rng.integers(1, 4, (8, 2)), 6)
    return {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": input_segments,
        "decoder_target_tokens": targets,
        "decoder_segment_ids": target_segments,
        "decoder_input_tokens": shift_right(targets),
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


def make_step():
    """(state, step): the step takes state and batch, and returns the new state and the loss."""
    vocabulary = seqio.PassThroughVocabulary(CONFIG.vocab_size, eos_id=1)
    network = CONFIG.network()
    model = CodaEncoderDecoderModel(network, vocabulary, vocabulary, optax.adam(1e-2))
    variables = {"params": random_params(CONFIG), "params_axes": shapes(CONFIG)["params_axes"]}
    state = train_state.FlaxOptimTrainState.create(model.optimizer_def, freeze(variables))

    def step(state, batch):
        def loss(params):
            return model.loss_fn(params, batch, None)[0]

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradient(gradients, learning_rate=1e-2), value

    return state, step


def losses(state, step):
    """The losses of three steps, and the state after them."""
    found = []
    for _ in range(3):
        state, loss = step(state, make_batch())
        found.append(float(loss))
    return found, state


def main():
    """Runs on all devices, two of which share a copy of the model."""
    partitioner = partitioning.PjitPartitioner(
        num_partitions=None,
        model_parallel_submesh=(1, 1, 1, 2),
        logical_axis_rules=partitioning.standard_logical_axis_rules(),
    )
    state, step = make_step()
    axes = partitioner.get_mesh_axes(state)
    step = partitioner.partition(
        step,
        in_axis_resources=(axes, partitioner.data_partition_spec),
        out_axis_resources=(axes, None),
    )
    found, state = losses(state, step)
    kernel = state.params["encoder"]["layers_0"]["adapter"]["wi"]["kernel"]
    shards = sorted({str(shard.data.shape) for shard in kernel.addressable_shards})
    mesh = dict(partitioner.mesh.shape)
    print(json.dumps({"losses": found, "mesh": mesh, "adapter_shards": shards}))


if __name__ == "__main__":
    main()
