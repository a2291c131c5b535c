"""Reports as `coda compare` writes them, to look at and to test with."""

import base64
import io

from matplotlib import image
import numpy as np

HOSTILE = '<script>alert("x")</script> \' & </table> $\\frac$ ${task}'
# name: (trained parameters, mean, standard error, encoder speed-up over the dense model)
RECIPES = {
    "full fine-tuning": (2_600_000, 71.9, 0.5, 1.0),
    "parallel adapter": (83_000, 70.1, 0.3, 0.97),
    "LoRA": (65_000, 70.4, 0.4, 0.98),
    "prefix tuning": (40_000, 61.0, 1.1, 0.9),
    "CoDA, r = 3": (84_000, 70.2, 0.4, 3.1),
    "CoDA, r = 3, LoRA": (66_000, 69.6, 0.3, 3.15),
    "CoDA, r = 5": (84_000, 69.8, 0.6, 4.9),
    "CoDA, r = 8, truncation": (84_000, 58.3, 0.9, 7.4),
}
SEEDS = (0, 1, 2)
STEPS = 2300


def report() -> dict:
    """All methods of a text task, with an input of each kind."""
    rng = np.random.default_rng(0)
    return {
        "task": "stdlib_module",
        "metric": "accuracy",
        "better": "max",
        "steps": [STEPS],
        "seeds": [*SEEDS],
        "checkpoints": ["coda_jax/bundled/stdlib_t5_coda"],
        "timed": [[4, 1024], [8, 512]],
        "recipes": {name: _recipe(name, *row, rng) for name, row in RECIPES.items()},
        "dense": {"speed": _speed(1.0)},
        "baselines": {"linear SVM": 66.2},
        "routed": [_text(rng), _image(rng), _sound(rng)],
        "versions": {"jax": "0.10.0", "device": "cpu"},
        "seconds": 512.0,
    }


def _speed(faster: float) -> dict:
    def record(milliseconds, ratio):
        def over(value):
            return [value, 0.96 * value, 1.05 * value]

        references = {"dense model": over(ratio), "parallel adapter": over(ratio / 0.97)}
        return {
            "encoder_ms": milliseconds / ratio,
            "encoder_speed_up": references,
            "flops_ratio": 1.07 * ratio,
            "end_to_end_ms": milliseconds / ratio + 14.5,
            "end_to_end_speed_up": references,
        }

    first = {"train_step_ms": 300 / faster**0.5, "train_step_bytes": round(8e8 / faster**0.5)}
    return {"4x1024": record(205.6, faster) | first, "8x512": record(170.1, faster**0.9)}


def _recipe(name, trained, mean, error, faster, rng) -> dict:
    cells = {}
    for seed in SEEDS:
        directory = f"{name.replace(' ', '_')}/{seed}"
        steps = range(20, STEPS + 1, 20)
        loss = [[s, 0.9 + 3 * np.exp(-s / 500) + 0.1 * rng.standard_normal()] for s in steps]
        curve = [[s, mean * (1 - np.exp(-s / 500)) + rng.standard_normal()] for s in steps[24::25]]
        command = f"--gin_file=methods/coda.gin --gin.SEED={seed} --gin.MODEL_DIR='{directory}'"
        cells[str(seed)] = {
            "score": mean + (seed - 1) * error,
            "directory": directory,
            "train": f"coda train --gin_file=runs/finetune.gin {command}",
            "evaluate": f"coda evaluate --gin_file=runs/evaluate.gin {command}",
            "seconds": 120.0,
            "curve": {"loss": loss, "eval/loss": curve},
        }
    return {
        "methods": ["coda", "parallel_adapter"] if faster > 2 else ["parallel_adapter"],
        "trained": trained,
        "total": 2_600_000,
        "stored": trained,
        "mean": mean,
        "error": error,
        "cells": cells,
        "speed": _speed(faster),
        "tpu": {"v5e": {"encoder_cycles": round(1e6 / faster), "encoder_speed_up": faster**0.8}},
    }


def _routing(rng, parts, layers=4) -> list[list[float]]:
    """Weights of a third of the parts in each layer, the same in no two layers."""
    scores = rng.random((layers, parts))
    cut = np.quantile(scores, 2 / 3, axis=-1, keepdims=True)
    return np.where(scores > cut, (scores - cut) / (1 - cut), 0).tolist()


def _text(rng) -> dict:
    source = 'def loads(text, *, cls=None):\n    """Reads JSON, <b>any</b>."""\n    if cls is None'
    pieces = [piece for word in source.split(" ") for piece in (word, " ")]
    return {
        "recipe": "CoDA, r = 3",
        "title": "held-out function of json; answer: json",
        "kind": "text",
        "pieces": pieces,
        "weights": _routing(rng, len(pieces)),
    }


def _image(rng) -> dict:
    sheet = np.ones((128, 512))
    sheet[40:90, 60:90] = sheet[30:100, 300:310] = sheet[60:70, 290:330] = 0
    file = io.BytesIO()
    image.imsave(file, sheet, cmap="gray", vmin=0, vmax=1)
    return {
        "recipe": "CoDA, r = 3",
        "title": "held-out sheet; answer: 407",
        "kind": "image",
        "image": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        "grid": [8, 32],
        "weights": _routing(rng, 8 * 32),
    }


def _sound(rng) -> dict:
    energy = np.convolve(rng.random(220), np.ones(9) / 9, mode="valid")
    return {
        "recipe": "CoDA, r = 2",
        "title": "three seven",
        "kind": "sound",
        "energy": energy.tolist(),
        "weights": _routing(rng, len(energy)),
    }


def hostile() -> dict:
    """Every text is one that would run or end something if it were not escaped."""

    def spoiled(value):
        if isinstance(value, str):
            return HOSTILE
        if isinstance(value, list):
            return [spoiled(x) for x in value]
        if isinstance(value, dict):
            return {key: spoiled(x) for key, x in value.items()}
        return value

    found = report()
    kept = {key: found[key] for key in ("metric", "better")}
    recipes = {f"{HOSTILE} {name}": spoiled(row) for name, row in found["recipes"].items()}
    spoiled_routed = [spoiled(x) | {"kind": x["kind"]} for x in found["routed"]]
    return spoiled(found) | kept | {
        "recipes": recipes,
        "baselines": {HOSTILE: 66.2},
        "routed": spoiled_routed,
    }  # fmt: skip


def sparse() -> dict:
    """Names and means, one of which is not a number, and nothing else."""
    return {"recipes": {"one": {"mean": 50.0}, "two": {"mean": float("nan")}}}
