"""The adaptations of `runs/demo*.gin` in Python, for programs that vary what no recipe can say."""

from collections.abc import Mapping
import dataclasses
import pathlib

from coda_jax import bundled
from coda_jax.commands.evaluate import evaluate
from coda_jax.commands.loading import LoadedModel
from coda_jax.data.source import Data
from coda_jax.inference import Decoding
from coda_jax.tasks import offline, offline_images, offline_speech  # noqa: F401 (register tasks)

WARM_UP_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What is adapted to what, and how.

    Attributes:
        task: the seqio task; the answers to its test split are judged.
        feature_lengths: of its examples in evaluation.
        train_data: what all models are adapted on, in the same order.
        steps: of adaptation.
        learning_rate: the peak, for the parallel adapter.
        coda_learning_rate: the peak, for CoDA.
        dense: folder of the dense checkpoint.
        coda: folder of the same after conditional pretraining, with its `adapter`.
        reductions: r of each CoDA model.
        metric: the one of the task's metrics that is reported, in per cent.
    """

    task: str
    feature_lengths: Mapping[str, int]
    train_data: Data
    steps: int
    learning_rate: float
    coda_learning_rate: float
    dense: pathlib.Path
    coda: pathlib.Path
    reductions: tuple[int, ...]
    metric: str = "accuracy"

    def score(self, model: LoadedModel) -> float:
        """The metric of the answers to the test split, in per cent."""
        decoding = Decoding(max_decode_length=self.feature_lengths["targets"])
        found = evaluate(model, self.task, self.feature_lengths, decoding, split="test")
        return found[self.task][self.metric]


_SHEETS, _RECORDINGS = {"inputs": 256, "targets": 8}, {"inputs": 400, "targets": 10}
ADAPTATIONS = {
    "text": Adaptation(
        task="stdlib_module",
        feature_lengths={"inputs": 512, "targets": 8},
        train_data=Data(
            {"inputs": 128, "targets": 24}, "stdlib_module_windows", batch_size=8, pack=True
        ),
        steps=2300,
        learning_rate=3e-2,
        coda_learning_rate=1e-2,
        dense=bundled.DENSE,
        coda=bundled.CODA,
        reductions=(3, 5),
    ),
    "images": Adaptation(
        task="digit_strips",
        feature_lengths=_SHEETS,
        train_data=Data(_SHEETS, "digit_strips", batch_size=16),
        steps=700,
        learning_rate=2e-2,
        coda_learning_rate=2e-2,
        dense=bundled.DENSE_IMAGES,
        coda=bundled.CODA_IMAGES,
        reductions=(4, 8),
    ),
    "speech": Adaptation(
        task="spoken_digits",
        feature_lengths=_RECORDINGS,
        train_data=Data(_RECORDINGS, "spoken_digits", batch_size=8),
        steps=400,
        learning_rate=1e-2,
        coda_learning_rate=4e-3,
        dense=bundled.DENSE_SPEECH,
        coda=bundled.CODA_SPEECH,
        reductions=(2, 4),
        metric="wer",
    ),
}
