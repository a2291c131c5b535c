"""What the tests of commands share: `coda` as a shell calls it."""

import json

import gin
import numpy as np

from coda_jax import cli


def flags(files=(), bindings=None):
    """The flags of gin files and {name: value}; values are written without quotes of their own."""
    return [
        *(f"--gin_file={file}" for file in files),
        *(f"--gin.{name}={value}" for name, value in (bindings or {}).items()),
    ]


def coda(command, files, bindings):
    """Runs a command, which must succeed, and leaves no configuration behind."""
    cli.run([command, *flags(files, bindings)])
    gin.clear_config()


def letters_task(folder, train, validation):
    """Writes a JSONL task of so many words each, with their first letters; its files by macro."""
    rng, files = np.random.default_rng(0), {}
    for name, count in (("train", train), ("validation", validation)):
        words = ["".join(rng.choice(list("abcdef"), 5)) for _ in range(count)]
        lines = [json.dumps({"inputs": word, "targets": word[0]}) for word in words]
        path = files[f"{name.upper()}_FILE"] = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n")
    return files
