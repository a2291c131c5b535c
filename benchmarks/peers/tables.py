"""The report of the peers, as a dictionary and as tables.

{"cases": {"MODEL, batch B, N tokens in": {measure: {engine: {
    "median", "least", "quartiles": of the seconds; "seconds": of each round;
    "reference": seconds of the first engine in the same run;
    "ratio": median of the rounds' ratios of the first engine's time to this one's;
    "agrees": see `agreement`}}}}}
"""

import json
import re
import statistics

import numpy as np

REFERENCE = "ours float32"
ENCODER = "encoder"


def answer(length: int) -> str:
    """The measure of an answer."""
    return f"{length} tokens out" if length > 1 else "1 token out"


def add(report: dict, model: str, shape: tuple[int, int], seconds: dict, outputs: dict) -> None:
    """Puts a run's figures into the report, over those that it has of the same engines.

    Args:
        report: see the head of this file.
        model: what was timed.
        shape: batch size and input length.
        seconds: {measure: {engine: of each round}}.
        outputs: {measure: {engine: arrays, float for the encoder, whole numbers for answers}}.
    """
    case = report["cases"].setdefault(f"{model}, batch {shape[0]}, {shape[1]} tokens in", {})
    for measure, engines in seconds.items():
        base, expected = engines[REFERENCE], outputs[measure][REFERENCE]
        for name, taken in engines.items():
            low, median, high = np.quantile(taken, [0.25, 0.5, 0.75]).round(5).tolist()
            case.setdefault(measure, {})[name] = {
                "median": median,
                "least": min(taken),
                "quartiles": [low, high],
                "seconds": taken,
                "reference": base,
                "ratio": statistics.median(a / b for a, b in zip(base, taken, strict=True)),
                "agrees": agreement(outputs[measure][name], expected),
            }


def agreement(output: np.ndarray, expected: np.ndarray) -> float:
    """Of tokens the share that is equal; of encodings the largest difference by the largest value.

    Raises:
        ValueError: the shapes differ.
    """
    if output.shape != expected.shape:
        raise ValueError(f"the output has shape {output.shape} and not {expected.shape}")
    if np.issubdtype(expected.dtype, np.integer):
        return round(float((output == expected).mean()), 4)
    return float(f"{np.abs(output - expected).max() / np.abs(expected).max():.1e}")


def _cell(figures: dict) -> str:
    low, high = (1e3 * value for value in figures["quartiles"])
    return f"{1e3 * figures['median']:.0f} ms ({low:.0f} to {high:.0f}), {figures['ratio']:.2f}x"


def _agrees(figures: dict, measure: str) -> str:
    if measure == ENCODER:
        return f"{figures['agrees']:.0e}"
    return f"{100 * figures['agrees']:.0f} %"


def markdown(report: dict) -> str:
    """A table for each case: median, quartiles, and speed relative to the first engine."""
    lines = [f"{name} {version}" for name, version in report.get("versions", {}).items()]
    lines = [", ".join(lines) + f"; {report.get('threads')} threads"]
    for title, measures in report["cases"].items():
        names = list(dict.fromkeys(name for engines in measures.values() for name in engines))
        lines += ["", f"**{title}**", "", "| | " + " | ".join(measures) + " | equal |"]
        lines += ["|---" * (2 + len(measures)) + "|"]
        for name in names:
            found = {m: engines[name] for m, engines in measures.items() if name in engines}
            cells = [_cell(found[m]) if m in found else "" for m in measures]
            equal = "; ".join(_agrees(figures, m) for m, figures in found.items())
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {equal} |")
    return "\n".join(lines)


def compact(report: dict) -> str:
    """The report as JSON, one engine a line."""
    text = json.dumps(report, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), text) + "\n"
