"""A tiny model and the runs of the trainer that tests make of it."""

from helpers import config, random_params, random_tokens, shift_right
import numpy as np
import optax

from coda_jax.objectives import Seq2Seq
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


def run(directory, *, cfg=CONFIG, options=OPTIONS, batches=None, **changes):
    """Trains the tiny model; returns (its parameters before, after, metrics)."""
    before = random_params(cfg)
    arguments = {
        "optimizer": optax.adamw,
        "learning_rate": 1e-2,
        "run": {"name": "test"},
        "eval_batches": lambda: make_batches(2),
    } | changes
    after, metrics = trainer.train(
        Seq2Seq(cfg),
        before,
        make_batches() if batches is None else batches,
        options=options,
        directory=directory,
        **arguments,
    )
    return before, after, metrics
