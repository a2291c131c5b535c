"""`coda export`: a model as a folder that answers without coda_jax.

It has `jax.export` programs beside the weights, which they share, the vocabulary, and modules that
answer lines of texts or names of files with them: load.py and what it imports, see `served`.

A program takes one batch size and one length of inputs. Where outputs are drawn, it takes two more
arguments, a uint32 seed and the uint32 numbers of the inputs, [B]: `program.call(weights, inputs,
seed, numbers)`. Where several outputs of an input are asked for, it gives (tokens [B, n, L], scores
[B, n]), the best first. Rows of the inputs that are only padding fill up a batch: they have no
output, and no step waits for them. An output ends with the token in which a stop text is complete.
An encoder's gives what `objectives.encoding` says. The manifest lists arguments and results.
Where a logit of an input is not finite there is no answer: all its tokens are -1, and its score is
NaN.
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from coda_jax import checks, files, methods, trees
from coda_jax.commands import served
from coda_jax.commands.loading import LoadedModel, sized, with_checkpoint_defaults
from coda_jax.data.batches import buckets
from coda_jax.data.vocabularies import (
    Vocabulary,
    check_vocabulary,
    find_fingerprint,
    identity,
    load_vocabulary,
)
from coda_jax.inference import Decoding, generate_function, stops_of
from coda_jax.nn.quantized import quantization_of
from coda_jax.objectives import NOT_FINITE, Model, model_for
from coda_jax.objectives.encoding import encode_function

MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "weights.npz"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_ENCODES = {"arguments": ["weights", "inputs"], "results": ["outputs"]}


def program_name(batch_size: int, length: int) -> str:
    """The file of the program for a batch size and a length of inputs."""
    return f"predict_{batch_size}x{length}.jax_export"


def export(
    model: LoadedModel,
    output: str,
    decoding: Decoding,
    batch_sizes: Sequence[int] | None = None,
    platforms: Sequence[str] = ("cpu",),
    vocabulary: str | None = None,
    embed: str | None = None,
) -> None:
    """Writes programs (weights, inputs) -> output tokens [B, L]; see the module for other ones.

    The inputs are token ids [B, N] int32, or patches [B, N, C] float32.

    Args:
        model: what answers.
        output: the folder to write; it must not exist yet or be empty.
        decoding: how outputs are made, and the longest input; see
            `with_checkpoint_defaults` for what is open.
        batch_sizes: B of the programs; None for that of `decoding`.
        platforms: some of `PLATFORMS`; each program holds all of them.
        vocabulary: folder or file of the vocabulary, or "bytes"; None: beside the checkpoint;
            without one the folder has no load.py.
        embed: "mean" or "tokens" for programs of the encoder alone; see `encode_function`.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: a value is out of its range; the vocabulary is not the model's.
    """
    checks.paths(OUTPUT=output, VOCABULARY=vocabulary)
    files.check_new(output)
    sizes = checks.Maybe(checks.Each(checks.COUNT, least=1))("BATCH_SIZES", batch_sizes)
    sizes = sizes or (decoding.batch_size,)
    platforms = checks.Each(checks.OneOf(PLATFORMS), least=1)("PLATFORMS", platforms)
    decoding = sized(decoding, model)
    config, params = model.config, model.params
    if not quantization_of(params):  # into which nothing merges
        config, params = methods.merge(config, params)
    found = _vocabulary(model, vocabulary)
    if embed is not None or model_for(config).describes:
        decoding.check_encodes()
        answer = encode_function(model_for(config), embed)
        described = {**_ENCODES, "labels": None if embed else config.labels}
    else:
        decoding = with_checkpoint_defaults(decoding, model)
        answer, described = _generates(model_for(config), decoding, found)
    flat = trees.flatten(params)
    trees.check_finite(flat)
    shapes = list(itertools.product(sizes, buckets(decoding.max_input_length)))
    specs = {shape: config.input_spec(*shape) for shape in shapes}
    whole_numbers = np.issubdtype(specs[shapes[0]].dtype, np.integer)
    described |= {"fill": config.pad_id if whole_numbers else 0, "platforms": platforms}
    with files.atomic_folder(output) as directory:
        described["vocabulary"] = served.write_loader(directory, model.inputs.served, found)
        _write(directory, answer, described, specs, flat)
    print(_limits(shapes, described))


def _vocabulary(model: LoadedModel, named: str | None) -> Vocabulary | None:
    """The vocabulary that is named, or lies beside the checkpoint; None where there is none."""
    if named is None and (model.directory is None or find_fingerprint(model.directory) is None):
        return None
    found = load_vocabulary(named or model.directory)
    check_vocabulary(identity(found), **model.vocabulary)
    return found


def _write(
    directory: pathlib.Path,
    answer: Callable,
    described: Mapping[str, Any],
    specs: Mapping[tuple[int, int], jax.ShapeDtypeStruct],
    flat: Mapping[str, Any],
) -> None:
    """Writes the programs by shape (B, N), the weights {path: leaf}, and what they are."""
    program = _program(answer, jax.tree.structure(flat))
    # A quantised leaf is two arrays, by the names of its fields.
    arrays = {
        "/".join([path.key, *(part.name for part in parts)]): np.asarray(array)
        for (path, *parts), array in jax.tree.leaves_with_path(flat)
    }
    weights = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays.values()]
    for shape, spec in tqdm(specs.items(), desc="export", unit="program"):
        arguments = [weights, spec]
        if "seed" in described["arguments"]:
            arguments += [_uint32(), _uint32(shape[0])]
        exported = jax.export.export(program, platforms=described["platforms"])(*arguments)
        (directory / program_name(*shape)).write_bytes(exported.serialize())
    _write_weights(directory, arrays)
    manifest = {
        "programs": {program_name(*shape): shape for shape in specs},
        "weights": {path: str(array.dtype) for path, array in arrays.items()},
        **described,
        "jax": jax.__version__,
    }
    files.write_json(directory / MANIFEST_NAME, manifest)


def _generates(
    objective: Model, decoding: Decoding, vocabulary: Vocabulary | None
) -> tuple[Callable, dict[str, Any]]:
    """What generates outputs, and what the manifest says of it."""
    generate, fixed = generate_function(objective, decoding), {}
    several = decoding.num_return_sequences > 1
    if decoding.stop_strings:
        fixed["stops"] = stops_of(decoding, vocabulary, objective.config)

    def answer(params, inputs, *drawing):
        given = dict(zip(("seed", "numbers"), drawing, strict=False))
        given |= {name: jnp.asarray(values) for name, values in fixed.items()}
        tokens, scores = generate(params, inputs, **given)
        return (tokens, scores) if several else tokens[:, 0]

    return answer, {
        "arguments": ["weights", "inputs", *["seed", "numbers"] * decoding.do_sample],
        "results": ["tokens", *["scores"] * several],
        "not_finite": {"tokens": NOT_FINITE},
        "decoding": decoding.given_options,
    }


def _limits(shapes: Sequence[tuple[int, int]], described: Mapping[str, Any]) -> str:
    """A sentence on what does not fit into the programs of some shapes (B, N)."""
    inputs = f"the programs take inputs of at most {max(length for _, length in shapes):,}"
    if "decoding" not in described:
        return f"{inputs}; longer ones must be cut before"
    limit = described["decoding"]["max_decode_length"]
    return (
        f"{inputs} and give outputs of at most {limit:,} tokens: one whose last token is neither "
        "the end marker nor padding was cut"
    )


def _uint32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.uint32)


def _program(answer: Callable, structure: Any) -> Callable:
    """Takes the arrays of {path: leaf} as a list: a loader needs neither Flax nor the tree."""

    @jax.jit
    def program(weights, inputs, *drawing):
        params = trees.unflatten(jax.tree.unflatten(structure, weights))
        return answer(params, inputs, *drawing)

    return program


def _write_weights(directory: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """npz knows no bfloat16: every array is stored as bytes, its dtype in the manifest."""
    raw = {path: array.reshape(*array.shape, 1).view(np.uint8) for path, array in arrays.items()}
    with open(directory / WEIGHTS_NAME, "wb") as file:
        np.savez(file, **raw)
