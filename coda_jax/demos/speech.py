"""`make demo-speech`: which digits are spoken in this noise?

`python -m coda_jax.demos.speech` adapts the bundled speech encoder, which was pretrained on digits
of four voices with little noise, to `spoken_digits`, more voices in noise, with the parallel
adapter and with CoDA at r = 2 and 4, and writes report.json, report.md and routing.png. The voice
of the held-out recordings is in no training.
"""

import pathlib

import numpy as np

from coda_jax import bundled
from coda_jax.commands.loading import LoadedModel
from coda_jax.data import audio, seqio_tasks
from coda_jax.data.source import Data
from coda_jax.demos import comparison
from coda_jax.profiling import plots
from coda_jax.tasks import offline_speech  # noqa: F401 (registers the tasks)

TASK = "spoken_digits"
LENGTHS = {"inputs": 400, "targets": 10}  # a whole recording: 8 s


def timed_inputs(rows: int, length: int) -> np.ndarray:
    """Held-out recordings, one after the other, in rows of the timed number of frames."""
    needed = -(-rows * length // LENGTHS["inputs"])
    stream = np.concatenate([e["inputs"] for e in comparison.heldout(TASK, LENGTHS, needed + rows)])
    return stream[: rows * length].reshape(rows, length, -1)


def draw(model: LoadedModel, path: pathlib.Path, count: int = 3) -> None:
    """The picture of the frames that each layer takes, in held-out recordings."""
    vocabulary = seqio_tasks.task_vocabulary(TASK)
    heldout = comparison.heldout(TASK, LENGTHS, count)
    inputs = [example["inputs"] for example in heldout]
    found = comparison.routed_answers(model, inputs, LENGTHS["targets"])
    examples = []
    for example, (weights, answer) in zip(heldout, found, strict=True):
        right = vocabulary.decode(example["targets"].tolist())
        heading = f"{right}; answer: {vocabulary.decode(answer)}"
        bins = example["inputs"][:, 1:].reshape(-1, audio.NUM_BINS)  # two windows are one frame
        examples.append((heading, bins, weights))
    plots.routed_frames(
        path,
        examples,
        f"Frames that the encoder's layers work on, r = {comparison.reduction_of(model):g}",
        seconds=audio.STACKED * audio.HOP / audio.SAMPLE_RATE,
    )


DEMO = comparison.Demo(
    task=TASK,
    feature_lengths=LENGTHS,
    train_data=Data(LENGTHS, TASK, batch_size=8),
    steps=400,
    learning_rate=1e-2,
    coda_learning_rate=4e-3,
    dense=bundled.DENSE_SPEECH,
    coda=bundled.CODA_SPEECH,
    reductions=(2, 4),
    timed_inputs=timed_inputs,
    timed_lengths=(400, 1500),  # 8 s and 30 s
    draw=draw,
    metric="wer",
)


if __name__ == "__main__":
    comparison.main(DEMO, "build/demo-speech")
