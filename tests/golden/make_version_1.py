"""Makes version_1/files.tar.xz: what version 1 of coda_jax wrote, for tiny random models.

Run it with a checkout of version 1 (commit 966504f) in front of everything else:
  PYTHONPATH=CHECKOUT python tests/golden/make_version_1.py

| folder | written by version 1 |
|---|---|
| `base`, `speech_base` | dense checkpoints in Hugging Face layout, `base` in bfloat16 |
| `run` | `coda train` for 3 steps: adapters and routers; with its export |
| `run_all` | the same with every leaf trained |
| `run_best_rq` | BEST-RQ for 3 steps, every leaf and routers |
| `t5x` | `coda convert` of the adapter file of `run` to T5X |

An adapter file is `run/export/adapter`. Logs are left out.
"""

import pathlib
import tarfile
import tempfile

import jax
import numpy as np
import optax

from coda_jax import batches, checkpoints, runs, training
from coda_jax.adapters import AdapterConfig
from coda_jax.best_rq import BestRQConfig
from coda_jax.convert import convert
from coda_jax.network import T5Config
from coda_jax.routing import CodaConfig
from coda_jax.speech import W2vBertConfig, join_frames

OUTPUT = pathlib.Path(__file__).parent / "version_1" / "files.tar.xz"
SIZES = {
    "vocab_size": 20,
    "emb_dim": 8,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "head_dim": 4,
    "mlp_dim": 12,
}
TEXT = T5Config(**SIZES, num_decoder_layers=1, mlp_activations=("gelu", "linear"), dropout_rate=0.0)
SPEECH = W2vBertConfig(**SIZES, feature_dim=6, conv_width=3, dropout_rate=0.0)
METHOD = {
    "adapter": AdapterConfig(bottleneck=4, activation="gelu"),
    "coda": CodaConfig(reduction=(2.5,), epsilon=0.1, attention="k_to_all"),
}


def save_base(folder, config, dtype):
    """Random weights as a Hugging Face checkpoint; every norm differs from 1."""
    params = runs.load_model(config=config, seed=1).params
    rng = np.random.default_rng(2)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), params)
    checkpoints.save_hf(folder, config, jax.tree.map(lambda x: x.astype(dtype), noisy))


def write_examples(path, inputs):
    """A cache of eight examples."""
    rng = np.random.default_rng(0)
    examples = [{"inputs": inputs(rng), "targets": rng.integers(2, 20, 4)} for _ in range(8)]
    batches.write_cache(path, examples, {"vocabulary": "bytes", "vocab_size": 20})


def train(folder, base, cache, trained, optimizer, best_rq=None):
    """A run of three steps, without its logs."""
    runs.train(
        str(folder),
        runs.load_model(str(base), **METHOD),
        runs.Data({"inputs": 8, "targets": 4}, cache=str(cache), batch_size=4),
        training.TrainOptions(3, trained=trained, save_every=3),
        optimizer=optimizer,
        learning_rate=0.1,
        best_rq=best_rq,
    )
    for log in folder.glob("events.out.tfevents*"):
        log.unlink()


def main():
    """Writes all folders and packs them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        text, speech = folder / "text.npz", folder / "speech.npz"
        write_examples(text, lambda rng: rng.integers(2, 20, 6))
        write_examples(
            speech,
            lambda rng: np.asarray(
                join_frames(rng.normal(size=(8, 6)).astype(np.float32), np.ones(8, bool))
            ),
        )
        save_base(folder / "base", TEXT, "bfloat16")
        save_base(folder / "speech_base", SPEECH, "float32")
        train(folder / "run", folder / "base", text, "adapters", optax.adamw)
        train(folder / "run_all", folder / "base", text, "all", optax.sgd)
        options = BestRQConfig(num_codes=5, code_dim=3, start_probability=0.3, span=2)
        train(folder / "run_best_rq", folder / "speech_base", speech, "all", optax.sgd, options)
        adapter = folder / "run" / "export" / "adapter"
        convert(str(adapter), str(folder / "t5x"), "t5x", base=str(folder / "base"))
        text.unlink()
        speech.unlink()
        OUTPUT.parent.mkdir(exist_ok=True)
        with tarfile.open(OUTPUT, "w:xz", preset=9) as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)


if __name__ == "__main__":
    main()
