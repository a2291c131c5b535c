"""The commands of `coda`, one file each. `COMMANDS` is the table that `cli` reads.

`loading` puts a checkpoint, methods and an adapter file together for all of them; `encodings` is
what `predict` writes of an encoder.
"""

from collections.abc import Callable
import dataclasses
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Command:
    """A row of the table.

    Attributes:
        module: of `coda_jax.commands`.
        function: in it.
        summary: a line for people.
        reads_gin: whether gin files configure the function, which then takes no arguments. A
            command that has flags of its own instead adds them in `add_flags(parser)`, and its
            function takes what was parsed.
    """

    module: str
    function: str
    summary: str
    reads_gin: bool = True

    def load(self, function: str | None = None) -> Callable[..., Any]:
        """The function, or another of its module; only the command that runs is imported."""
        module = importlib.import_module(f"coda_jax.commands.{self.module}")
        return getattr(module, function or self.function)


COMMANDS = {
    "train": Command("train", "train", "adapt a model to a task"),
    "evaluate": Command("evaluate", "evaluate", "metrics of a task, from decoded outputs"),
    "predict": Command("predict", "predict", "answers to the inputs of a file"),
    "cache": Command("cache", "cache", "a task's tokenised examples in one file"),
    "check": Command("check", "check", "does a checkpoint fit a model, and what does it cost"),
    "convert": Command("convert", "convert", "a checkpoint in another layout"),
    "export": Command("export", "export", "programs that answer with jax and numpy alone"),
    "bench": Command("bench", "bench", "what routing saves on this machine", reads_gin=False),
}
