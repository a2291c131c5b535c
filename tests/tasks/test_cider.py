"""CIDEr against the COCO evaluation's own scorer, and by hand."""

import json
import math
import pathlib
import sys

import pytest

from coda_jax.tasks.cider import cider

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("number", range(4))
def test_scores_equal_those_that_the_original_gave(number):
    row = json.loads((GOLDEN / "cider.json").read_text())[number]
    found = cider(row["targets"], row["predictions"])["cider"]
    assert found == pytest.approx(row["cider"], rel=1e-9)
    assert row["cider"] > 50  # the captions do have words in common


def test_scores_equal_the_original_on_fresh_captions(monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="the live comparison needs pycocoevalcap")
    monkeypatch.setattr(sys, "path", [str(GOLDEN), *sys.path])
    import make_golden_cider

    for seed in range(100, 120):
        targets, predictions = make_golden_cider.captions(seed)
        expected = make_golden_cider.reference(targets, predictions)
        assert cider(targets, predictions)["cider"] == pytest.approx(expected, rel=1e-9)


def test_an_example_by_hand():
    """Two examples, so that a word of one alone weighs ln 2 and one of both nothing.

    Against "a login page", "a login" has 1 of the 2 words with weight, 1 of the 2 pairs, no triple
    and one bigram less: 10 exp(-1 / 72) (1 / sqrt 2 + 1 / sqrt 2 + 0 + 0) / 4.
    """
    expected = 10 * math.exp(-1 / 72) * math.sqrt(2) / 4
    found = cider([["a login page"], ["a list"]], ["a login", "nothing"])
    assert found == {"cider": pytest.approx(100 * expected / 2)}


def test_case_and_punctuation_do_not_matter():
    targets = [["A list of songs."], ["the user's page"]]
    assert cider(targets, ["a list of songs", "The user's page!"]) == pytest.approx(
        cider(targets, ["A list of songs.", "the user's page"])
    )


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="number 1 has no references"):
        cider([["a"], []], ["a", "b"])
    with pytest.raises(ValueError, match="2 targets and 1 predictions"):
        cider([["a"], ["b"]], ["a"])
