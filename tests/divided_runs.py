"""Runs of the trainer and answers on eight devices, and on one; a program that prints what differs.

python tests/divided_runs.py CASE ...
"""

import contextlib
import functools
import io
import json
import pathlib
import sys
import tempfile

from helpers import ADAPTER, config, random_params
import jax
import numpy as np
import optax

from coda_jax.inference import Decoding, Encodings, Predictor
from coda_jax.methods import Coda, Full, Lora
from coda_jax.models import FAMILIES, family_of
from coda_jax.objectives import model_for
from coda_jax.sharding import Placement
from coda_jax.training import trainer

MESH = {"data": 4, "model": 2}
STEPS = 4
OPTIONS = trainer.TrainOptions(total_steps=STEPS, save_every=2, accumulation=2)
CODA = Coda(reduction=2.0)
METHODS = {
    "parallel_adapter": (ADAPTER,),
    "coda": (CODA, ADAPTER),
    "lora": (Lora(rank=2),),
    "coda+lora": (CODA, Lora(rank=2)),
    "full": (Full(),),
}
CASES = {f"{family}-{name}": (family, methods)
         for family in FAMILIES for name, methods in METHODS.items()}  # fmt: skip


def sized(case):
    """The tiny model of a case with four heads, one layer, and dropout."""
    family, methods = CASES[case]
    sizes = {"num_heads": 4, "num_encoder_layers": 1, "dropout_rate": 0.1}
    return config(base=FAMILIES[family].tiny, **sizes).replace(methods=methods)


def batches(cfg, count, first=0):
    """Batches of eight random rows, the same at every call."""
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        targets = rng.integers(2, cfg.vocab_size, (8, 4)).astype(np.int32)
        yield {
            "encoder_input_tokens": family_of(cfg).inputs.random(cfg, rng, 8, 12),
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": np.ones_like(targets),
        }


def run(cfg, placement, folder, count=STEPS):
    """(the parameters after a run, its last evaluation); cut off where the data end before."""
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer.train(
            model_for(cfg),
            random_params(cfg),
            batches(cfg, count),
            options=OPTIONS,
            # With its usual eps it makes steps of full size from gradients that are rounding alone.
            optimizer=functools.partial(optax.adamw, eps=0.1),
            learning_rate=1e-2,
            directory=folder,
            run={},
            eval_batches=lambda: batches(cfg, 2, first=100),
            placement=placement,
        )


def resumed(cfg, placement, folder):
    """As `run`, cut off in the middle and started again."""
    with contextlib.suppress(ValueError):  # the data end
        run(cfg, placement, folder, count=STEPS // 2)
    return run(cfg, placement, folder)


def answers(cfg, params, placement):
    """(tokens, scores, encodings) of some inputs of several lengths."""
    rng = np.random.default_rng(1)
    inputs = [
        family_of(cfg).inputs.random(cfg, rng, 1, n)[0] for n in (3, 12, 7, 5, 11, 9, 2, 8, 4)
    ]
    tokens, scores = [], []
    options = [{}] if cfg.num_decoder_layers else []
    options += [{"num_beams": 2}, {"do_sample": True}] if cfg.num_decoder_layers else []
    for given in options:
        decoding = Decoding(max_decode_length=5, batch_size=8, **given)
        found = Predictor(cfg, params, decoding, placement=placement).candidates(inputs)
        for _, best, score in sorted(found, key=lambda x: x[0]):
            tokens.append(best[0].tolist())
            scores.append(float(score[0]))
    encodings = Encodings(cfg, params, Decoding(batch_size=8), "mean", placement)
    return tokens, scores, [x.tolist() for _, x in sorted(encodings(inputs), key=lambda x: x[0])]


def largest(found, expected):
    """The largest difference, as a share of the largest value, at least 1."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(a - b)) / max(1, np.max(np.abs(b)))) for a, b in pairs)


def same_bits(found, expected):
    """Whether two trees are equal to the last bit."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def compared(case):
    """How a case's runs and answers on many devices differ from those on one."""
    cfg = sized(case)
    one, many = Placement(devices=jax.devices()[:1]), Placement(MESH)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        params, metrics = run(cfg, one, folder / "one")
        found, found_metrics = run(cfg, many, folder / "many")
        again, again_metrics = resumed(cfg, many, folder / "cut")
    tokens, *numbers = answers(cfg, params, one)
    found_tokens, *found_numbers = answers(cfg, params, many)
    return {
        "moved": largest(found, jax.tree.map(np.asarray, random_params(cfg))),
        "parameters": largest(found, params),
        "metrics": largest(found_metrics, metrics),
        "resumed": same_bits(again, found) and again_metrics == found_metrics,
        "tokens": found_tokens == tokens,
        "numbers": largest(found_numbers, numbers),
    }


def memory():
    """[bytes of a device in a step, by its program and by its arrays], of several meshes."""
    cfg = FAMILIES["t5"].tiny.replace(
        methods=METHODS["coda"], vocab_size=512, num_heads=4, mlp_dim=256, dropout_rate=0.0
    )
    model, params, rows = model_for(cfg), random_params(cfg), []
    optimizer, options = optax.adamw(1e-3), trainer.TrainOptions(total_steps=1)
    for mesh in ({"data": 8}, {"data": 4, "model": 2}, {"data": 2, "model": 4}):
        placement = Placement(mesh)
        state, frozen, step = trainer._start(model, params, optimizer, options, placement, None)
        batch = placement.batch(next(batches(cfg, 1)))
        with placement.divided():
            compiled = step(0).lower(state, frozen, batch).compile()
        found = compiled.memory_analysis()
        rows.append(
            {
                "arguments": found.argument_size_in_bytes,
                "temporary": found.temp_size_in_bytes,
                "held": held((state, frozen, batch)),
                "frozen": held(frozen),
            }
        )
    return rows


def held(tree):
    """Bytes of a tree on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    print(json.dumps(memory() if sys.argv[1] == "memory" else compared(sys.argv[1])))
