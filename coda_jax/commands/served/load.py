"""Answers with the programs of this folder, without coda_jax: `python load.py < inputs.txt`.

    pip install jax numpy flatbuffers

and, where vocabulary.py and inputs.py name them, sentencepiece or tokenizers, pillow or soundfile.
inputs.py says what a line of inputs.txt is. For each a line of JSON with its "prediction" is
printed, that of `coda predict`. In Python, `Served` takes and gives arrays.
"""

import itertools
import json
import pathlib
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np


class Served:
    """A folder's programs; they take `batch_size` inputs at most, each of at most `longest`."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        arrays, kinds = np.load(folder / "weights.npz"), self.manifest["weights"].items()
        self._weights = [jnp.asarray(arrays[k].view(jnp.dtype(t))[..., 0]) for k, t in kinds]
        self._programs = []  # with what each takes, the smallest first
        for name in self.manifest["programs"]:
            program = jax.export.deserialize(bytearray((folder / name).read_bytes()))
            self._programs.append((program.in_avals[len(self._weights)], jax.jit(program.call)))
        self._programs.sort(key=lambda pair: pair[0].size)
        self.batch_size, self.longest, *self.channels = self._programs[-1][0].shape

    def __call__(self, rows, first=0):
        """What the manifest calls "results": arrays with a row for each of some inputs.

        Args:
            rows: inputs [n] or [n, channels].
            first: the number of the first of them, on which outputs that are drawn depend.
        """
        count, longest = len(rows), max(map(len, rows))
        fits = (x for x in self._programs if x[0].shape[0] >= count and x[0].shape[1] >= longest)
        spec, program = next(fits)
        inputs, drawn = np.full(spec.shape, self.manifest["fill"], spec.dtype), []
        for row, values in zip(inputs, rows, strict=False):
            row[: len(values)] = values
        if "seed" in self.manifest["arguments"]:
            numbers = np.arange(first, first + len(inputs), dtype=np.uint32)
            drawn = [np.uint32(self.manifest["decoding"]["seed"]), numbers]
        found = program(self._weights, inputs, *drawn)
        return [np.asarray(result)[:count] for result in jax.tree.leaves(found)]


def prediction(manifest, decode, length, found, *_):
    """The text, label or numbers that the first result for an input of some length says.

    Raises:
        FloatingPointError: the model's outputs are NaN or infinite.
    """
    options, labels = manifest.get("decoding"), manifest.get("labels")
    outputs = found if options or found.ndim == 1 else found[:length]
    finite = outputs.min() >= 0 if options else np.isfinite(outputs).all()
    if not finite:
        raise FloatingPointError("no answer: the model's outputs are NaN or infinite")
    if not options:
        return labels[outputs.argmax()] if labels else outputs.squeeze().tolist()

    def text(tokens):
        end = manifest["vocabulary"]["eos_id"]
        return decode([*itertools.takewhile(lambda token: token != end, tokens)])

    whole = text(np.atleast_2d(outputs)[0].tolist())  # of the best output
    start = len(text(options.get("decoder_prefix") or ()))
    for stop in options.get("stop_strings") or ():
        place = whole.find(stop, max(0, start - len(stop) + 1))
        whole = whole if place < 0 else whole[: place + len(stop)]
    return whole


def main():
    """Prints a line of JSON for each line of standard input."""
    import inputs  # like the next, a file of the folder
    import vocabulary

    folder = pathlib.Path(__file__).parent
    served, done = Served(folder), 0
    encode, decode = vocabulary.load(folder, served.manifest["vocabulary"])
    sys.stdin.reconfigure(encoding="utf-8", newline="\n")
    sys.stdout.reconfigure(encoding="utf-8")
    while batch := [*itertools.islice(sys.stdin, served.batch_size)]:
        lines = [line.removesuffix("\n").removesuffix("\r") for line in batch]
        rows = [inputs.read(line, served, encode) for line in lines]
        for line, row, *results in zip(lines, rows, *served(rows, done), strict=True):
            said = prediction(served.manifest, decode, len(row), *results)
            answer = json.dumps({inputs.FIELD: line, "prediction": said}, ensure_ascii=False)
            print(answer, flush=True)
        done += len(lines)


if __name__ == "__main__":
    main()
