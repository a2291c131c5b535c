"""`coda export`: a model as files that answer with jax and numpy alone.

They are `jax.export` programs beside the weights, which they share. A program takes one batch size
and one length of inputs. To load them:

    manifest = json.load(open(f"{folder}/manifest.json"))
    arrays = np.load(f"{folder}/weights.npz")
    weights = [arrays[k].view(jnp.dtype(t))[..., 0] for k, t in manifest["weights"].items()]
    program = jax.export.deserialize(open(f"{folder}/predict_32x64.jax_export", "rb").read())
    tokens = program.call(weights, inputs)
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from coda_jax import files, methods, trees
from coda_jax.commands.loading import LoadedModel
from coda_jax.inference import Decoding, bucket, predict_function
from coda_jax.objectives import Model, model_for

MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "weights.npz"


def program_name(batch_size: int, length: int) -> str:
    """The file of the program for a batch size and a length of inputs."""
    return f"predict_{batch_size}x{length}.jax_export"


def lengths(decoding: Decoding) -> list[int]:
    """All padded lengths of inputs that `coda predict` knows, ascending."""
    longest = decoding.max_input_length
    return sorted({bucket(length, longest) for length in range(1, longest + 1)})


def export(
    model: LoadedModel,
    output: str,
    decoding: Decoding,
    batch_sizes: Sequence[int] | None = None,
    platforms: Sequence[str] = ("cpu",),
) -> None:
    """Writes programs (weights, inputs) -> output tokens [B, L].

    The inputs are token ids [B, N] int32, or patches [B, N, C] float32.

    Args:
        model: what answers.
        output: the folder to write; it must not exist yet or be empty.
        decoding: how outputs are searched for, and the longest input.
        batch_sizes: B of the programs; None for that of `decoding`.
        platforms: "cpu", "cuda", "rocm" or "tpu"; each program holds all of them.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: a batch size below 1.
    """
    directory = pathlib.Path(output)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; name a new folder")
    batch_sizes = [decoding.batch_size] if batch_sizes is None else list(batch_sizes)
    if min(batch_sizes) < 1:
        raise ValueError(f"batch sizes must be at least 1, got {batch_sizes}")
    directory.mkdir(parents=True, exist_ok=True)
    config, params = methods.merge(model.config, model.params)
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    predict = _predict_function(model_for(config), list(flat), decoding)
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in flat.values()]
    shapes = [(size, length) for size in batch_sizes for length in lengths(decoding)]
    for shape in tqdm(shapes, desc="export", unit="program"):
        inputs = config.input_spec(*shape)
        exported = jax.export.export(predict, platforms=list(platforms))(weights, inputs)
        (directory / program_name(*shape)).write_bytes(exported.serialize())
    _write_weights(directory, flat)
    manifest = {
        "programs": {program_name(*shape): shape for shape in shapes},
        "weights": {path: str(leaf.dtype) for path, leaf in flat.items()},
        "max_decode_length": decoding.max_decode_length,
        "platforms": list(platforms),
        "jax": jax.__version__,
    }
    files.write_json(
        directory / MANIFEST_NAME, manifest
    )  # the last file: without it nothing counts


def _predict_function(model: Model, paths: Sequence[str], decoding: Decoding):
    """Takes the weights as a list, so that a loader needs neither Flax nor the tree."""

    predict = predict_function(model, decoding)

    @jax.jit
    def predict_from_list(weights, tokens):
        return predict(trees.unflatten(dict(zip(paths, weights, strict=True))), tokens)

    return predict_from_list


def _write_weights(directory: pathlib.Path, flat: Mapping[str, Any]) -> None:
    """npz knows no bfloat16: every leaf is stored as bytes, its dtype in the manifest."""
    raw = {path: leaf.reshape(*leaf.shape, 1).view(np.uint8) for path, leaf in flat.items()}
    with open(directory / WEIGHTS_NAME, "wb") as file:
        np.savez(file, **raw)
