"""Makes cider.json: random captions and what the COCO evaluation's own scorer gives each set.

Run with pycocoevalcap 1.2 installed: python tests/golden/make_golden_cider.py
"""

import json
import pathlib

import numpy as np

TEXT = "a page screen of the app's settings list with two options in 3 rows login displays"


def captions(seed, count=12):
    """Random references, 1 to 5 for each example, and predictions that share words with them."""
    rng = np.random.default_rng(seed)

    def text():
        return " ".join(rng.choice(TEXT.split(), size=rng.integers(1, 12)))

    targets = [[text() for _ in range(rng.integers(1, 6))] for _ in range(count)]
    predictions = []
    for texts in targets:
        words = texts[0].split()
        cut = rng.integers(len(words) + 1)
        predictions.append(" ".join([*words[:cut], *text().split()[: rng.integers(6)]]))
    return targets, predictions


def reference(targets, predictions):
    """100 times the mean score of pycocoevalcap's CIDEr."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for texts, prediction in zip(targets, predictions, strict=True):
        scorer += (prediction, texts)
    return 100 * float(scorer.compute_score()[0])


if __name__ == "__main__":
    rows = []
    for seed in range(4):
        targets, predictions = captions(seed)
        score = reference(targets, predictions)
        rows.append({"targets": targets, "predictions": predictions, "cider": score})
    path = pathlib.Path(__file__).parent / "cider.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")
