"""Tests of coda_jax.tasks.metrics: known values, brute force, and what must not matter."""

import collections
import itertools
import re
import string
import unicodedata

from hypothesis import assume, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from rouge_score import rouge_scorer

from coda_jax.tasks import metrics

few_examples = settings(max_examples=100)

WORDS = [
    "the",
    "A",
    "an",
    "Paris",
    "paris,",
    "of",
    "café",
    "U.S.",
    "\u2018x\u2019",
    "-",
    "",
    "b",
    "cat",
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join) | st.text(max_size=8)
ANSWERS = st.lists(TEXTS, min_size=1, max_size=4)
QUESTIONS = st.lists(st.tuples(ANSWERS, TEXTS), min_size=1, max_size=6)


def squad_of(questions):
    answers, predictions = zip(*questions, strict=True)
    return metrics.squad(answers, predictions)


def approx(**values):
    return {name: pytest.approx(value) for name, value in values.items()}


# --- SQuAD. ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The first two: T5's qa_utils_test.py.
        ("`Needs\tA_LOT of the 'normalization'.\"\u2018", "needs alot of normalization\u2018"),
        ("needs no normalization", "needs no normalization"),
        # By hand: articles are words, whole and of any case; they go after the punctuation has.
        ("The theory, an  AN\nanagram a", "theory anagram"),
        ("a.n t-h-e", ""),
        ("naïve Ä", "naïve ä"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_squads_script_does(text, expected):
    assert metrics.normalized_answer(text) == expected


def test_squad_takes_the_best_answer_of_each_question():
    # T5's metrics_test.py, test_squad_big. The quotes are not ASCII, so they stay: the first
    # prediction is three words, of which "big" is right: F1 = 2 * 1 / (3 + 2); (0.4 + 1) / 4.
    targets = [["big moose", "hippo"], ["correct1"], ["correct2.1", "correct2.2"], ["a", "b"]]
    predictions = ["\u2018a big  Moose!\u2018", "wrong", "correct2.2", "c"]
    assert metrics.squad(targets, predictions) == approx(em=25, f1=35)
    # T5's test_squad_small: precision 1, recall 1 / 2; "$$$$" is nothing at all.
    assert metrics.squad([["abc abd", "$$$$"]], ["abd"]) == approx(em=0, f1=200 / 3)
    # By hand: the words count as often as they stand there: 2 P R / (P + R), P = 2/3, R = 2/4.
    assert metrics.squad([["x x y z"]], ["x y y"]) == approx(em=0, f1=400 / 7)


def test_nothing_shares_no_word_with_nothing_as_in_squads_script():
    assert metrics.squad([["the"]], ["a"]) == {"em": 100, "f1": 0}


def brute_force_f1(answer, prediction):
    """The most pairs of equal words, each word in one pair, as precision and recall."""
    longer, shorter = sorted((answer.split(), prediction.split()), key=len, reverse=True)
    pairs = max(
        sum(a == b for a, b in zip(order, shorter, strict=True))
        for order in itertools.permutations(longer, len(shorter))
    )
    if pairs == 0:
        return 0.0
    precision, recall = pairs / len(prediction.split()), pairs / len(answer.split())
    return 2 * precision * recall / (precision + recall)


def brute_force_normalized(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    words = re.split(r"(\W+)", text)
    return " ".join("".join(" " if w in ("a", "an", "the") else w for w in words).split())


@few_examples
@given(QUESTIONS)
def test_squad_is_its_definition(questions):
    em, f1 = [], []
    for answers, prediction in questions:
        given_words = brute_force_normalized(prediction)
        normal = [brute_force_normalized(answer) for answer in answers]
        em.append(given_words in normal)
        f1.append(max(brute_force_f1(answer, given_words) for answer in normal))
    assert squad_of(questions) == approx(em=100 * np.mean(em), f1=100 * np.mean(f1))


@few_examples
@given(QUESTIONS, st.randoms(use_true_random=False))
def test_the_order_of_answers_and_questions_does_not_matter(questions, random):
    shuffled = [(random.sample(answers, len(answers)), p) for answers, p in questions]
    random.shuffle(shuffled)
    assert squad_of(shuffled) == approx(**squad_of(questions))


@few_examples
@given(QUESTIONS)
def test_exact_matches_have_an_f1_of_one_and_more_answers_never_hurt(questions):
    assume(all(metrics.normalized_answer(prediction) for _, prediction in questions))
    result = squad_of(questions)
    assert 0 <= result["em"] <= result["f1"] + 1e-9 <= 100 + 2e-9
    assert squad_of([(answers[:1], p) for answers, p in questions])["f1"] <= result["f1"] + 1e-9
    assert squad_of([([*answers, p], p) for answers, p in questions]) == approx(em=100, f1=100)


# --- ReCoRD. ---


def target(group, *answers):
    return {"group": group, "answers": list(answers)}


def test_record_counts_each_query_once():
    # By hand. Two queries: "Ann Lee" is right in the first (twice among the examples), and the
    # second has one word of two: EM (1 + 0) / 2, F1 (1 + 2/3) / 2. By example it would be 2 / 3.
    targets = [
        target((7, 0), "Ann Lee", "Ann"),
        target((7, 0), "Ann Lee", "Ann"),
        target((7, 1), "Bob Roe"),
    ]
    assert metrics.record(targets, ["ann lee", "ann lee", "Bob"]) == approx(em=50, f1=500 / 6)
    # Neither number alone tells queries apart.
    assert metrics.record([target((0, 1), "x"), target((1, 1), "y")], ["x", "x"])["em"] == 50
    assert metrics.record([target((1, 0), "x"), target((1, 1), "y")], ["x", "x"])["em"] == 50


@few_examples
@given(QUESTIONS, st.lists(st.integers(1, 4), min_size=6, max_size=6))
def test_record_is_squad_over_the_queries(questions, repeats):
    examples = [
        (target((3, i), *answers), prediction)
        for i, (answers, prediction) in enumerate(questions)
        for _ in range(repeats[i])
    ]
    targets, predictions = zip(*examples, strict=True)
    assert metrics.record(targets, predictions) == approx(**squad_of(questions))


# --- ROUGE. ---


def test_rouge_of_equal_and_of_different_texts():
    # T5's metrics_test.py, test_same_rouge and test_different_rouge.
    text = "this is a string"
    names = ("rouge1", "rouge2", "rougeLsum")
    assert metrics.rouge([text] * 2, [text] * 2) == dict.fromkeys(names, 100)
    assert metrics.rouge([text] * 2, [""] * 2) == dict.fromkeys(names, 0)


def test_rouge_counts_words_pairs_and_subsequences():
    # By hand. Words: the cat sat / the sat cat on. Shared words 3 of 3 and 4: F1 = 6 / 7. Shared
    # pairs: none of (the cat, cat sat). Longest common subsequence: the sat, 2: F1 = 4 / 7.
    first = approx(rouge1=600 / 7, rouge2=0, rougeLsum=400 / 7)
    assert metrics.rouge(["The cat sat."], ["the sat cat on"]) == first
    # The mean over the summaries, not over their words.
    both = metrics.rouge(["The cat sat.", "one"], ["the sat cat on", "one"])
    assert both == approx(rouge1=(600 / 7 + 100) / 2, rouge2=0, rougeLsum=(400 / 7 + 100) / 2)


def test_sentences_of_lsum_end_with_a_lone_full_stop():
    # By hand: as two sentences, in either order, all six words are in common subsequences; as one
    # sentence only three are.
    target, turned = "a b c . d e f", "d e f . a b c"
    assert metrics.rouge([target], [turned])["rougeLsum"] == pytest.approx(100)
    without = metrics.rouge([target.replace(" .", ".")], [turned.replace(" .", ".")])
    assert without["rougeLsum"] == pytest.approx(50)


def ngram_f1(target, prediction, n):
    def ngrams(text):
        words = re.findall("[a-z0-9]+", text.lower())
        return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    a, b = ngrams(target), ngrams(prediction)
    shared = sum(min(count, b[gram]) for gram, count in a.items())
    return 2 * shared / (sum(a.values()) + sum(b.values())) if shared else 0.0


ASCII = st.lists(st.sampled_from([w for w in WORDS if w.isascii()]), max_size=6).map(" ".join)
ASCII |= st.text(st.characters(max_codepoint=127), max_size=8)


@few_examples
@given(st.lists(st.tuples(ASCII, ASCII), min_size=1, max_size=5))
def test_rouge_of_ascii_is_that_of_t5(pairs):
    """Of the library's own tokenizer."""
    own = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"])
    scores = [own.score(*(text.replace(" . ", " .\n") for text in pair)) for pair in pairs]
    expected = {x: 100 * np.mean([score[x].fmeasure for score in scores]) for x in scores[0]}
    assert metrics.rouge(*zip(*pairs, strict=True)) == approx(**expected)


SCRIPTS = [
    *["Кошка сидит на окне.", "猫が窓の上にいる。", "猫坐在窗台上。", "แมวนั่งอยู่บนหน้าต่าง"],
    *["고양이가 창가에 앉아 있다.", "बिल्ली खिड़की पर बैठी है।", "القطة على النافذة", "החתול יושב"],
    *["Η γάτα κάθεται", "ကြောင်", "Katze äußerst Übermut", "ⅷ ½ ﬁ", "გამარჯობა", "ជំរាបសួរ"],  # noqa: RUF001
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_rouge_of_a_text_in_any_script_with_itself_is_100(text):
    found = metrics.rouge([text], [text])
    assert found["rouge1"] == found["rougeLsum"] == 100
    decomposed = unicodedata.normalize("NFD", text).swapcase()
    assert metrics.rouge([text], [decomposed])["rouge1"] == 100
    assert metrics.rouge([text], ["other words"])["rouge1"] == 0


@pytest.mark.parametrize(
    ("target", "prediction", "rouge1"),
    [
        ("Über äußerst", "Öber üußerst", 0),
        ("Über äußerst", "uber ausserst", 0),  # other letters, though ASCII's would be alike
        ("Straße", "STRASSE", 100),
        ("кошка на окне", "кошка на столе", 200 / 3),
        ("猫が窓", "猫と窓", 200 / 3),  # by characters
        ("한국 사람", "한국 음식", 50),  # by words
        ("ที่", "ที", 0),  # a character with its marks
        ("\u0646\u06cc\u200c\u062e", "\u0646\u06cc\u062e", 100),  # a joiner is not seen
        ("👍️", "👎️", 0),  # nor is what makes a symbol an emoji
        ("don't_go", "don t go", 100),
    ],
)
def test_rouge_compares_words_of_any_script(target, prediction, rouge1):
    assert metrics.rouge([target], [prediction])["rouge1"] == pytest.approx(rouge1)
    assert metrics.rouge_of_any([[target]], [prediction])["rouge1"] == pytest.approx(rouge1)


@few_examples
@given(st.lists(st.tuples(ASCII, ASCII), min_size=1, max_size=5))
def test_rouge_1_and_2_are_their_definitions(pairs):
    targets, predictions = zip(*pairs, strict=True)
    result = metrics.rouge(targets, predictions)
    for n in (1, 2):
        expected = 100 * np.mean([ngram_f1(t, p, n) for t, p in pairs])
        assert result[f"rouge{n}"] == pytest.approx(expected)
    assert result["rougeLsum"] <= result["rouge1"] + 1e-9
    assert metrics.rouge(predictions, targets) == approx(**result)  # F1 is symmetric.


# --- Errors of transcripts. ---

sentences = st.lists(st.sampled_from(["a", "ab", "cat", "bat"]), max_size=5).map(" ".join)


def test_transcript_errors_count_edits_of_words_and_characters_over_all_transcripts():
    targets = ["the cat sat", "on", ""]
    predictions = ["the bat sat down", "on", ""]
    found = metrics.transcript_errors(targets, predictions)
    assert found == {"wer": pytest.approx(100 * 2 / 4), "cer": pytest.approx(100 * 6 / 13)}
    assert metrics.transcript_errors(targets, targets) == {"wer": 0, "cer": 0}
    assert metrics.transcript_errors(["a b"], [""]) == {"wer": 100, "cer": 100}


def test_letters_are_the_same_however_they_are_composed():
    text = "Åse hörte 한국 ấm й"
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert metrics.transcript_errors([composed], [decomposed]) == {"wer": 0, "cer": 0}
    assert metrics.transcript_errors([decomposed], ["Åse"])["cer"] == pytest.approx(100 * 14 / 17)
    assert metrics.anls([[composed]], [decomposed]) == {"anls": 100}
    assert metrics.rouge([composed], [decomposed])["rougeLsum"] == 100


@few_examples
@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4))
def test_transcript_errors_are_their_definition(pairs):
    targets, predictions = zip(*pairs, strict=True)
    assume(any(targets))
    found = metrics.transcript_errors(targets, predictions)
    for name, split in (("wer", str.split), ("cer", list)):
        edits = sum(metrics.levenshtein(split(a), split(b)) for a, b in pairs)
        total = sum(len(split(target)) for target in targets)
        assert found[name] == pytest.approx(100 * edits / total)


# --- What makes no sense. ---


@pytest.mark.parametrize(
    "metric", [metrics.squad, metrics.record, metrics.rouge, metrics.transcript_errors]
)
@pytest.mark.parametrize(("targets", "predictions"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_targets_and_predictions_must_fit(metric, targets, predictions):
    message = f"{len(targets)} targets and {len(predictions)} predictions"
    with pytest.raises(ValueError, match=message):
        metric(targets, predictions)


def test_a_question_without_answers_is_named():
    with pytest.raises(ValueError, match="number 1 has no answers"):
        metrics.squad([["a"], []], ["a", "a"])


def test_transcripts_without_a_word_are_an_error():
    with pytest.raises(ValueError, match="All 2 targets are empty"):
        metrics.transcript_errors(["", " "], ["a", "b"])


# --- GLUE. ---

LABELS = st.sampled_from(["yes", "no", "maybe", "perhaps"])


@few_examples
@given(st.lists(st.tuples(st.booleans(), LABELS), min_size=1, max_size=12))
def test_f1_is_that_of_counted_hits(answers):
    """2 hits / (2 hits + false alarms + misses), where what is no label is wrong."""
    targets = ["yes" if truth else "no" for truth, _ in answers]
    wrong = {"yes": "no", "no": "yes"}
    said = [x if x in wrong else wrong[t] for t, (_, x) in zip(targets, answers, strict=True)]
    pairs = list(zip(targets, said, strict=True))
    hits, others = pairs.count(("yes", "yes")), sum(a != b for a, b in pairs)
    expected = 200 * hits / (2 * hits + others) if hits else 0.0
    found = metrics.f1_of("no", "yes")(targets, [x for _, x in answers])
    assert found == approx(f1=expected)


@few_examples
@given(st.lists(st.tuples(st.booleans(), LABELS), min_size=1, max_size=12))
def test_matthews_is_a_correlation_of_three_classes(answers):
    """Gorodkin's R_K: covariances of the indicators of yes, no, and what is neither."""
    targets = np.array([[truth, not truth, False] for truth, _ in answers], float)
    said = np.array([[x == "yes", x == "no", x not in ("yes", "no")] for _, x in answers], float)

    def covariance(a, b):
        return ((a - a.mean(0)) * (b - b.mean(0))).sum()

    scale = covariance(targets, targets) * covariance(said, said)
    expected = 100 * covariance(targets, said) / scale**0.5 if scale > 1e-12 else 0.0
    found = metrics.matthews_of("yes", "no")(
        ["yes" if truth else "no" for truth, _ in answers], [x for _, x in answers]
    )
    assert found == {"matthews_corrcoef": pytest.approx(expected, abs=1e-6)}


def test_correlations_of_what_does_not_vary_and_of_one_pair():
    assert metrics.correlations(["1.0", "2.0"], ["x", "nan"]) == {
        "pearson_corrcoef": 0.0,
        "spearman_corrcoef": 0.0,
    }
    with pytest.raises(ValueError, match="A correlation needs two targets, there is 1"):
        metrics.correlations(["1.0"], ["1.0"])
