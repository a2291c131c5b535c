"""The paper's experiments: one list, and the commands that run them with either trainer.

`python -m coda_jax.tasks.experiments > docs/experiments.md` writes the table of all of them.
"""

from collections.abc import Iterator
import dataclasses
import itertools

COMMANDS = {"coda": "coda train", "t5x": "coda t5x train"}
TRAINERS = (*COMMANDS,)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model adapted to a task, or pretrained for it.

    Attributes:
        task: a file of gin_configs/tasks.
        preset: a published size.
        recipe: a file of gin_configs/methods.
        reduction: r; None for a recipe without routing.
        inputs: "text", "images" or "speech".
        batch_size: rows of a batch; None for the trainer's own.
    """

    task: str
    preset: str
    recipe: str
    reduction: int | None
    inputs: str = "text"
    batch_size: int | None = None

    @property
    def name(self) -> str:
        """Task, size, recipe and r, such as "mnli t5_1_1_base coda r3"."""
        routed = "" if self.reduction is None else f" r{self.reduction}"
        return f"{self.task} {self.preset} {self.recipe}{routed}"

    @property
    def trainers(self) -> tuple[str, ...]:
        """Who can run it: T5X has no CTC, which the speech encoders are trained with."""
        return ("coda",) if self.inputs == "speech" else TRAINERS

    def arguments(self, trainer: str) -> list[str]:
        """What follows `coda train` or `coda t5x train`, but for paths and TRAIN_STEPS.

        Raises:
            ValueError: the trainer is unknown, or cannot run it.
        """
        if trainer not in self.trainers:
            raise ValueError(f"{self.name}: trainer {trainer!r} must be one of {self.trainers}")
        pretrains = self.recipe == "coda_pretrain"
        if trainer == "coda":
            files = ["runs/finetune.gin"]
        else:
            files = ["t5x/pretrain.gin" if pretrains else "t5x/finetune.gin"]
            files += ["t5x/images.gin"] if self.inputs == "images" else []
        files += [f"methods/{self.recipe}.gin", f"tasks/{self.task}.gin"]
        values = {"REDUCTION": self.reduction, "BATCH_SIZE": self.batch_size}
        given = [f"--gin.{name}={value}" for name, value in values.items() if value is not None]
        return [*(f"--gin_file={f}" for f in files), f"--gin.PRESET={self.preset}", *given]


def _text() -> Iterator[Experiment]:
    """Every task at three sizes, the ablations at one; where the paper does not say, T5's rows."""
    sizes, rows = ("base", "large", "xl"), {"batch_size": 128}
    for task, size in itertools.product(("mnli", "rte", "boolq", "squad", "record", "xsum"), sizes):
        yield Experiment(task, f"t5_1_1_{size}", "parallel_adapter", None, **rows)
        for reduction in (3, 5):
            yield Experiment(task, f"t5_1_1_{size}", "coda", reduction, **rows)
    for ablation, reduction in itertools.product(
        ("sigmoid", "truncation", "k_to_all", "iterative"), (3, 5)
    ):
        yield Experiment("mnli", "t5_1_1_base", f"coda_{ablation}", reduction, **rows)
    for size, reduction in itertools.product(sizes, (3, 5)):
        yield Experiment("c4", f"t5_1_1_{size}", "coda_pretrain", reduction, **rows)


def _images() -> Iterator[Experiment]:
    for task in ("ocr_vqa", "docvqa", "screen2words"):
        yield Experiment(task, "pix2struct_base", "parallel_adapter", None, "images")
        yield Experiment(task, "pix2struct_base", "coda", 8, "images")


def _speech() -> Iterator[Experiment]:
    yield Experiment("librispeech_other", "w2v_bert_large", "parallel_adapter", None, "speech")
    yield Experiment("librispeech_other", "w2v_bert_large", "coda", 2, "speech")


EXPERIMENTS: tuple[Experiment, ...] = (*_text(), *_images(), *_speech())

_HEAD = """# The paper's experiments

Made by `python -m coda_jax.tasks.experiments > docs/experiments.md`. Each row is run by

    coda train ARGUMENTS --gin.INITIAL_CHECKPOINT_PATH=... --gin.MODEL_DIR=... --gin.TRAIN_STEPS=...

or, with T5X (docs/t5x.md says how to set it up), by

    coda t5x train ARGUMENTS --gin.INITIAL_CHECKPOINT_PATH=... --gin.MODEL_DIR=... \\
      --gin.TRAIN_STEPS=... --gin.VOCABULARY=...

Tasks of images take a `DIRECTORY` too. What the paper does not say is T5's for fine-tuning.
Its results are in its own tables: none was rerun at these sizes. What was measured on small
checkpoints is in docs/ablations.md.
"""


def markdown() -> str:
    """docs/experiments.md: the arguments of every experiment for every trainer that can run it."""
    lines = [_HEAD]
    for trainer in TRAINERS:
        lines += [f"## `{COMMANDS[trainer]}`", ""]
        lines += ["| experiment | arguments |", "|---|---|"]
        for experiment in EXPERIMENTS:
            if trainer in experiment.trainers:
                arguments = " ".join(experiment.arguments(trainer))
                lines.append(f"| {experiment.name} | `{arguments}` |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
