"""How outputs that are texts are compared with their targets, without seqio."""

from collections.abc import Sequence


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns {"accuracy": the percentage of the predictions that equal their targets}."""
    matches = sum(t == p for t, p in zip(targets, predictions, strict=True))
    return {"accuracy": 100.0 * matches / max(len(targets), 1)}


def strip_text(text: str, **unused_kwargs) -> str:
    """Returns the text without white space around it: the postprocessor of the text tasks."""
    return text.strip()
