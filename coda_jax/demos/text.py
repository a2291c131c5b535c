"""`make demo`: which module of Python's standard library is this function from?

`python -m coda_jax.demos.text` adapts the bundled T5 to `stdlib_module` with the parallel adapter
and with CoDA at r = 3 and 5, from random windows of the training functions, and writes report.json,
report.md and routing.png.
"""

import pathlib
import re

import numpy as np

from coda_jax import bundled
from coda_jax.commands.loading import LoadedModel
from coda_jax.data import seqio_tasks
from coda_jax.data.source import Data
from coda_jax.demos import comparison
from coda_jax.profiling import plots
from coda_jax.tasks import baselines, offline  # noqa: F401 (registers the tasks)

TASK = "stdlib_module"
WHOLE = {"inputs": 4096, "targets": 64}  # feature lengths that cut nothing


def timed_inputs(rows: int, length: int) -> np.ndarray:
    """Held-out functions, one after the other, in rows of the timed length."""
    stream = np.concatenate([e["inputs"] for e in comparison.heldout(TASK, WHOLE, 100)])
    return stream[: rows * length].reshape(rows, length)


def draw(model: LoadedModel, path: pathlib.Path, count: int = 3) -> None:
    """The picture of what each layer takes, for held-out functions of medium length."""
    vocabulary = seqio_tasks.task_vocabulary(TASK)
    heldout = comparison.heldout(TASK, WHOLE, 200)
    heldout = [example for example in heldout if 90 <= len(example["inputs"]) <= 220][:count]
    inputs = [example["inputs"] for example in heldout]
    found = comparison.routed_answers(model, inputs, max_decode_length=8)
    examples = []
    for example, (weights, answer) in zip(heldout, found, strict=True):
        right = vocabulary.decode(example["targets"].tolist())
        heading = f"held-out function of {right}; answer: {vocabulary.decode(answer)}"
        examples.append((heading, [_text(vocabulary, t) for t in example["inputs"]], weights))
    plots.routed_text(
        path,
        examples,
        f"Tokens that the encoder's layers work on, r = {comparison.reduction_of(model):g} "
        "(the darker, the more layers)",
    )


def _text(vocabulary, token: int) -> str:
    """The characters of one token, for the listing."""
    piece = vocabulary.tokenizer.id_to_piece(int(token))
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    if byte:
        return chr(int(byte[1], 16))
    return "" if piece == "</s>" else piece.replace("▁", " ")


DEMO = comparison.Demo(
    task=TASK,
    feature_lengths={"inputs": 512, "targets": 8},  # a whole function, the name of a module
    train_data=Data(
        {"inputs": 128, "targets": 24},  # as in pretraining
        "stdlib_module_windows",  # of the same task's training functions
        batch_size=8,  # packed rows: on a CPU, many small steps teach more than few large ones
        pack=True,
    ),
    steps=2300,
    learning_rate=3e-2,
    coda_learning_rate=1e-2,  # conditional pretraining has trained these adapters already
    dense=bundled.DENSE,
    coda=bundled.CODA,
    reductions=(3, 5),
    timed_inputs=timed_inputs,
    timed_lengths=(1024,),
    draw=draw,
    baselines=lambda: baselines.baselines(TASK),
)


if __name__ == "__main__":
    comparison.main(DEMO, "build/demo")
