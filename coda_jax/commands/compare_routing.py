"""What a model of `coda compare` takes of some held-out inputs, as data and as a picture."""

import base64
from collections.abc import Mapping, Sequence
import io
from typing import Any

import jax
import numpy as np

from coda_jax import methods
from coda_jax.commands.loading import LoadedModel
from coda_jax.data.source import Data
from coda_jax.models import family_of
from coda_jax.objectives import model_for
from coda_jax.optional import needs

_LOOKED_AT = 64  # inputs among which those of a size that fits a page are chosen
_LENGTH = 150  # tokens of a text that fits


def routes(model: LoadedModel) -> bool:
    """Whether a model has a router."""
    return methods.unrouted(model.config.methods) != model.config.methods


def examples(
    model: LoadedModel,
    task: str,
    split: str | None,
    input_length: int,
    answer_length: int,
    count: int = 3,
) -> list[dict[str, Any]]:
    """Some inputs of a task, as their family shows them, with the weights of each layer.

    Args:
        model: a model with a router.
        task, split: where the inputs are from.
        input_length, answer_length: the most that is read and answered.
        count: of inputs.

    Returns:
        [what `Inputs.shown` returns, with "title" and "weights" [layers, n]].
    """
    lengths = {"inputs": input_length, "targets": answer_length}
    reading = {"batch_size": _LOOKED_AT, "shuffle": False, "leave_out": True}
    data = Data(lengths, task, **reading).with_split(split)
    objective = model_for(model.config)
    batches = data.batches(repeat=False, **model.layout, expected=objective.expects)
    batch = next(iter(batches))
    inputs, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    family = family_of(model.config)
    used = np.asarray(model.config.network().input_mask(inputs)).sum(-1)
    chosen = sorted(np.flatnonzero(used), key=lambda i: abs(int(used[i]) - _LENGTH))[:count]

    @jax.jit
    def run(params, rows):
        answers = objective.predict(params, rows, max_decode_length=answer_length)
        return objective.routing(params, rows), answers

    weights, answers = map(np.asarray, run(model.params, inputs[np.array(chosen)]))
    found = []
    for place, row in enumerate(chosen):
        n = int(used[row])
        decode = data.vocabulary.decode
        right, answer = decode(targets[row].tolist()), decode(answers[place].tolist())
        found.append(
            family.inputs.shown(inputs[row][:n], data.vocabulary)
            | {"title": f"{right}; answer: {answer}", "weights": weights[:, place, :n]}
        )
    return found


def as_json(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example as JSON: a picture becomes a PNG in text, sound its loudness."""
    found = dict(example)
    found["weights"] = [[float(f"{w:.3g}") for w in layer] for layer in example["weights"]]
    if example["kind"] == "image":
        with needs("images"):
            from PIL import Image

        file = io.BytesIO()
        Image.fromarray(example["image"]).save(file, "PNG")
        found["image"] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    if example["kind"] == "sound":
        del found["spectrogram"], found["seconds"]
        frames = np.reshape(example["spectrogram"], (len(example["weights"][0]), -1))
        found["energy"] = np.round(frames.mean(-1), 3).tolist()
    return found


def draw(path: Any, found: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws the examples, which are of one kind, into a PNG file."""
    from coda_jax.profiling import plots  # Here: it needs matplotlib.

    kinds = {example["kind"] for example in found}
    if kinds == {"text"}:
        parts = [(x["title"], x["pieces"], x["weights"]) for x in found]
        plots.routed_text(path, parts, title)
    elif kinds == {"image"}:
        parts = [(x["title"], x["image"], x["weights"].reshape(-1, *x["grid"])) for x in found]
        plots.routed_images(path, parts, title)
    else:
        parts = [(x["title"], x["spectrogram"], x["weights"]) for x in found]
        plots.routed_frames(path, parts, title, found[0]["seconds"])
