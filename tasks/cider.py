"""CIDEr-D, the metric of captions, as the COCO evaluation computes it.

Texts are compared by their n-grams of 1 to 4 words, each weighed by how rare it is among the
references. With counts c(g) of an n-gram and the number d(g) of the M examples whose references
have it, v(g) = c(g) (ln M - ln max(1, d(g))), and for one reference r of a prediction p

    score(p, r) = 10 exp(-(b_p - b_r)^2 / 72) mean_n [ min(v_p, v_r) . v_r / (|v_p| |v_r|) ],

b the number of bigrams. An example's score is the mean over its references.

Reference: Vedantam et al. 2015, CIDEr, with the "D" variant's clipping and penalty of lengths. The
original splits texts by a Java program; here words are those of `words` with apostrophes, which is
the same for captions.
"""

from collections import Counter
from collections.abc import Sequence
import math

from coda_jax.tasks.metrics import check_pairs
from coda_jax.tasks.words import words

MAX_N = 4
SIGMA = 6.0  # of the penalty for another length, in bigrams

_NGram = tuple[str, ...]


def cider(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """CIDEr-D over a set of captions; a rare n-gram is one that few examples' references have.

    Args:
        targets: the references of each example.
        predictions: one for each example.

    Returns:
        {"cider"}: 100 times the mean score, as it is published.

    Raises:
        ValueError: no texts, another number of predictions, or an example without references.
    """
    check_pairs(targets, predictions)
    for number, texts in enumerate(targets):
        if not texts:
            raise ValueError(f"The example number {number} has no references")
    references = [[_ngrams(text) for text in texts] for texts in targets]
    documents = Counter(g for texts in references for g in set().union(*texts))
    total = 0.0
    for texts, prediction in zip(references, map(_ngrams, predictions), strict=True):
        scores = [_score(prediction, text, documents, len(references)) for text in texts]
        total += sum(scores) / len(scores)
    return {"cider": 100 * total / len(references)}


def _ngrams(text: str) -> Counter[_NGram]:
    found = words(text, "'_")
    return Counter(
        tuple(found[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(found) - n + 1)
    )


def _score(
    prediction: Counter[_NGram], reference: Counter[_NGram], documents: Counter[_NGram], count: int
) -> float:
    """The score of one prediction and one reference; `count` is M."""

    def vector(ngrams, n):
        return {
            g: c * (math.log(count) - math.log(max(1, documents[g])))
            for g, c in ngrams.items()
            if len(g) == n
        }

    def bigrams(ngrams):
        return sum(c for g, c in ngrams.items() if len(g) == 2)

    similarity = 0.0
    for n in range(1, MAX_N + 1):
        found, wanted = vector(prediction, n), vector(reference, n)
        lengths = math.hypot(*found.values()) * math.hypot(*wanted.values())
        if lengths:
            product = sum(min(found.get(g, 0.0), v) * v for g, v in wanted.items())
            similarity += product / lengths / MAX_N
    difference = bigrams(prediction) - bigrams(reference)
    return 10 * math.exp(-(difference**2) / (2 * SIGMA**2)) * similarity
