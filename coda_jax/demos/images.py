"""`make demo-vision`: which handwritten digits are on this sheet?

`python -m coda_jax.demos.images` adapts the bundled Pix2Struct, which was pretrained on printed
letters, to `digit_strips` with the parallel adapter and with CoDA at r = 4 and 8, and writes
report.json, report.md and routing.png.
"""

import pathlib

import numpy as np

from coda_jax import bundled
from coda_jax.commands.loading import LoadedModel
from coda_jax.data import images, seqio_tasks
from coda_jax.data.source import Data
from coda_jax.demos import comparison
from coda_jax.profiling import plots
from coda_jax.tasks import offline_images

TASK = "digit_strips"
LENGTHS = {"inputs": 256, "targets": 8}  # 256 patches are a whole sheet in full resolution


def timed_inputs(rows: int, length: int) -> np.ndarray:
    """Held-out sheets, scaled to the timed number of patches."""
    heldout = comparison.heldout(TASK, {**LENGTHS, "inputs": length}, rows)
    return np.stack([example["inputs"] for example in heldout])


def draw(model: LoadedModel, path: pathlib.Path, count: int = 4) -> None:
    """The picture of the patches that each layer takes, on held-out sheets."""
    vocabulary = seqio_tasks.task_vocabulary(TASK)
    sheets = [offline_images.digit_strip("test", number) for number in range(count)]
    inputs = [np.asarray(images.patches(image, LENGTHS["inputs"])) for image, _ in sheets]
    found = comparison.routed_answers(model, inputs, LENGTHS["targets"])
    examples = []
    for (image, right), patches, (weights, answer) in zip(sheets, inputs, found, strict=True):
        grid = patches[-1, :2].astype(int)  # the last patch's row and column, from 1
        heading = f"{right}; answer: {vocabulary.decode(answer)}"
        examples.append((heading, image, weights.reshape(-1, *grid)))
    plots.routed_images(
        path,
        examples,
        f"Patches that the encoder's layers work on, r = {comparison.reduction_of(model):g} "
        "(the rest is dimmed)",
    )


DEMO = comparison.Demo(
    task=TASK,
    feature_lengths=LENGTHS,
    train_data=Data(LENGTHS, TASK, batch_size=16),
    steps=700,
    learning_rate=2e-2,
    coda_learning_rate=2e-2,
    dense=bundled.DENSE_IMAGES,
    coda=bundled.CODA_IMAGES,
    reductions=(4, 8),
    timed_inputs=timed_inputs,
    timed_lengths=(256, 1024),
    draw=draw,
)


if __name__ == "__main__":
    comparison.main(DEMO, "build/demo-vision")
