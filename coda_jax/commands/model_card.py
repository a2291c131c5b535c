"""The model card beside an adapter file: `README.md` as the Hugging Face Hub reads it.

A header in YAML, for machines; then what the adapter is, of which base, and how to load it. It says
what was given on the command line, and nothing of the machine or the time.
"""

from collections.abc import Iterator, Mapping
import contextlib
import contextvars
import dataclasses
import json
import os
from pathlib import Path
import shlex
from typing import Any

from coda_jax import files

CARD = "README.md"
_COMMAND: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("command", default=())


@contextlib.contextmanager
def made_by(*words: str) -> Iterator[None]:
    """While open, cards say that this command made what they describe: its name and arguments."""
    token = _COMMAND.set(words)
    try:
        yield
    finally:
        _COMMAND.reset(token)


def write_card(
    folder: str | os.PathLike,
    config: Any,
    counts: tuple[int, int],
    *,
    base: str | None = None,
    task: str | None = None,
    metrics: Mapping[str, float] | None = None,
    quantization: str | None = None,
) -> None:
    """Writes the card of an adapter.

    Args:
        folder: of the adapter file.
        config: of the adapted model.
        counts: parameters in the adapter file, and of the whole model.
        base: the checkpoint, as it was given.
        task: what it was trained on, as it was given.
        metrics: of the evaluation at the end.
        quantization: of the frozen weights, None for none.
    """
    names = [method.name for method in config.methods]
    what = f"{' + '.join(names)} of {base or f'a {config.family}'}" + f" for {task}" * bool(task)
    parts = [
        _header(config, names, base, metrics),
        f"# {what}\n",
        _facts(config, counts, base, task, quantization),
        "## Methods\n",
        *map(_described, config.methods),
    ]
    if metrics:
        rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in sorted(metrics.items()))
        parts += ["\n## Evaluation\n", f"| metric | value |\n|---|---|\n{rows}"]
    if command := _COMMAND.get():
        lines = " \\\n      ".join([command[0], *map(shlex.quote, command[1:])])
        parts += ["\n## The command that made it\n", f"    {lines}\n"]
    parts += ["\n## How to load it\n", _loading(base)]
    files.write_text(Path(folder) / CARD, "\n".join(parts))


def _header(config, names, base, metrics):
    """YAML; a text in JSON is one in YAML, too."""
    lines = ["library_name: coda_jax"]
    if base:
        lines += [
            f"base_model: {json.dumps(base, ensure_ascii=False)}",
            "base_model_relation: adapter",
        ]
    lines += ["tags:", "- adapter", f"- {config.family}", *(f"- {name}" for name in names)]
    if metrics:
        lines += ["metrics:", *(f"- {name}" for name in sorted(metrics))]
    return "\n".join(["---", *lines, "---", ""])


def _facts(config, counts, base, task, quantization):
    saved, whole = counts
    facts = {
        "base": base and f"`{base}`",
        "family": config.family,
        "task": task and f"`{task}`",
        "frozen weights": quantization,
        "parameters": f"{saved:,} of {whole:,} ({saved / whole:.2%})",
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items() if value)
    return f"| | |\n|---|---|\n{rows}"


def _described(method):
    values = (f"`{f.name}={getattr(method, f.name)!r}`" for f in dataclasses.fields(method))
    return f"- {' '.join([f'**{method.name}**', *values])}"


def _loading(base):
    named = json.dumps(base or "the folder above", ensure_ascii=False)
    return f"""\
```python
import coda_jax

config, params = coda_jax.load_hf({named})
config, params = coda_jax.load_adapter("this folder", config, params)
```

`coda predict` and `coda evaluate` load it with `INITIAL_CHECKPOINT_PATH` and
`INITIAL_ADAPTER_PATH`.
The adapter fits this base alone, which is checked.
"""
