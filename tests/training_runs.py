"""A tiny model and the runs of the trainer that tests make of it."""

from helpers import config, random_params, random_tokens, shift_right
import jax
import jax.numpy as jnp
import numpy as np
import optax

from coda_jax.objectives import Seq2Seq, Sums
from coda_jax.training import trainer

# Routing by sigmoid compiles faster than the soft top-k; to the trainer it is the same.
CONFIG = config({"reduction": 2.0, "routing": "sigmoid"}, num_encoder_layers=1, dropout_rate=0.1)
OPTIONS = trainer.TrainOptions(total_steps=6, save_every=3, log_every=2)


def make_batches(count=100, rows=4):
    """Batches of random tokens, the same at every call."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        inputs = random_tokens(rng, rng.integers(3, 9, rows), 8)
        targets = random_tokens(rng, rng.integers(1, 5, rows), 4)
        yield {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": shift_right(targets),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(np.int32),
        }


class Quick(Seq2Seq):
    """A loss that compiles at once: it reads some leaves, the targets and the random numbers."""

    def loss(self, params, batch, rng=None):
        """(the sum of losses, the sums)."""
        adapter = params["encoder"]["layers_0"]["adapter"]["wi"]["kernel"]
        scale = params["decoder"]["decoder_norm"]["scale"]
        noise = 0.0 if rng is None else jax.random.uniform(rng)
        targets = batch["decoder_target_tokens"].astype(jnp.float32)
        loss = jnp.sum((targets - jnp.mean(adapter) - noise) ** 2) * jnp.mean(scale**2)
        weight = jnp.float32(targets.size)
        return loss, Sums(loss, weight, jnp.sum(adapter), jnp.float32(0), jnp.float32(len(targets)))


def run(directory, *, cfg=CONFIG, options=OPTIONS, batches=None, model=Seq2Seq, **changes):
    """Trains the tiny model; returns (its parameters before, after, metrics)."""
    before = random_params(cfg)
    arguments = {
        "optimizer": optax.adamw,
        "learning_rate": 1e-2,
        "run": {"name": "test"},
        "eval_batches": lambda: make_batches(2),
    } | changes
    after, metrics = trainer.train(
        model(cfg),
        before,
        make_batches() if batches is None else batches,
        options=options,
        directory=directory,
        **arguments,
    )
    return before, after, metrics
