"""Metrics of the tasks, in per cent: exact match, F1, correlations, ROUGE, ANLS, errors of speech.

They are seqio metric functions, of all targets and predictions, which the postprocessors here make
of texts. Accuracy is `coda_jax.data.scores.accuracy`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import json
import math
import re
import string
import unicodedata

from coda_jax.optional import needs
from coda_jax.tasks.words import words

with needs():
    from scipy import stats
    from sklearn import metrics as sklearn_metrics

_ROUGE_TYPES = ("rouge1", "rouge2", "rougeLsum")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def all_answers(text: str, example=None, is_target: bool = False):
    """SQuAD's postprocessor: a target becomes the list of the example's "answers"."""
    return [answer.decode() for answer in example["answers"]] if is_target else text


def grouped_answers(text: str, example=None, is_target: bool = False):
    """ReCoRD's postprocessor: a target becomes {"group": a tuple, "answers": a list}."""
    if not is_target:
        return text
    answers = all_answers(text, example, is_target)
    return {"group": tuple(int(number) for number in example["group"]), "answers": answers}


def json_answers(text: str, example=None, is_target: bool = False):
    """A postprocessor: a target becomes the list in the JSON of the example's "answers"."""
    return json.loads(example["answers"]) if is_target else text.strip()


def normalized_answer(text: str) -> str:
    """Returns the text as SQuAD compares it.

    Args:
        text: an answer.

    Returns:
        The text in lower case, without ASCII punctuation and articles, with single spaces.
    """
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(?:the|an|a)\b", " ", text).split())


def token_f1(answer: str, prediction: str) -> float:
    """Returns the harmonic mean of precision and recall of a prediction's words.

    Args:
        answer: normalised, words with spaces between.
        prediction: likewise.

    Returns:
        A number in [0, 1]; 0 where nothing is shared, so also for two empty texts, as in SQuAD's
        own script.
    """
    words, predicted = answer.split(), prediction.split()
    shared = (Counter(words) & Counter(predicted)).total()
    # 2 P R / (P + R) with P = shared / predicted and R = shared / words.
    return 2 * shared / (len(words) + len(predicted)) if shared else 0.0


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """SQuAD's metrics: for each question the best over its answers.

    Args:
        targets: the right answers of each question.
        predictions: one for each question.

    Returns:
        {"em", "f1"}: the means of the exact matches and of the word F1.

    Raises:
        ValueError: no questions, another number of predictions, or a question without an answer.
    """
    check_pairs(targets, predictions)
    em = f1 = 0.0
    for number, (answers, prediction) in enumerate(zip(targets, predictions, strict=True)):
        if not answers:
            raise ValueError(f"The question number {number} has no answers")
        normalized = normalized_answer(prediction)
        em += _best(lambda answer, given: float(answer == given), answers, normalized)
        f1 += _best(token_f1, answers, normalized)
    return {"em": 100 * em / len(targets), "f1": 100 * f1 / len(targets)}


def _best(score: Callable[[str, str], float], answers: Sequence[str], prediction: str) -> float:
    return max(score(normalized_answer(answer), prediction) for answer in answers)


def record(targets: Sequence[Mapping], predictions: Sequence[str]) -> dict[str, float]:
    """ReCoRD's metrics: SQuAD's, over the questions rather than the examples.

    A question with several answers is as many examples, all with the same inputs.

    Args:
        targets: {"group": what tells questions apart, "answers": all right answers} per example.
        predictions: one for each example; the first of each group counts.

    Returns:
        {"em", "f1"}.

    Raises:
        ValueError: as for `squad`.
    """
    check_pairs(targets, predictions)
    questions: dict = {}
    for target, prediction in zip(targets, predictions, strict=True):
        questions.setdefault(target["group"], (target["answers"], prediction))
    answers, firsts = zip(*questions.values(), strict=True)
    return squad(answers, firsts)


def f1_of(negative: str, positive: str) -> Callable[..., dict[str, float]]:
    """The metric F1 of the positive of two labels; what is neither counts as the wrong one.

    Args:
        negative: the text of a label.
        positive: that of the other.

    Returns:
        (targets, predictions) -> {"f1"}, of T5's `f1_score_with_invalid`.
    """

    def f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        check_pairs(targets, predictions)
        right = [target == positive for target in targets]
        said = [
            prediction == positive if prediction in (negative, positive) else not truth
            for truth, prediction in zip(right, predictions, strict=True)
        ]
        return {"f1": 100 * float(sklearn_metrics.f1_score(right, said, zero_division=0))}

    return f1


def matthews_of(*labels: str) -> Callable[..., dict[str, float]]:
    """The metric Matthews' correlation; all that is no label counts as one more.

    Args:
        labels: their texts.

    Returns:
        (targets, predictions) -> {"matthews_corrcoef"}, from -100 to 100.
    """

    def matthews_corrcoef(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        check_pairs(targets, predictions)
        said = [prediction if prediction in labels else "" for prediction in predictions]
        found = sklearn_metrics.matthews_corrcoef(list(targets), said)
        return {"matthews_corrcoef": 100 * float(found)}

    return matthews_corrcoef


def correlations(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Pearson's and Spearman's correlation of numbers; a text that is none counts as -1, as in T5.

    Args:
        targets: texts of numbers.
        predictions: texts.

    Returns:
        {"pearson_corrcoef", "spearman_corrcoef"}, from -100 to 100; 0 where all predictions, or all
        targets, are the same.

    Raises:
        ValueError: fewer than two targets, or another number of predictions.
    """
    check_pairs(targets, predictions)
    if len(targets) < 2:
        raise ValueError(f"A correlation needs two targets, there is {len(targets)}")
    pairs = list(map(_number, targets)), list(map(_number, predictions))
    if min(len(set(values)) for values in pairs) == 1:
        return {"pearson_corrcoef": 0.0, "spearman_corrcoef": 0.0}
    return {
        "pearson_corrcoef": 100 * float(stats.pearsonr(*pairs).statistic),
        "spearman_corrcoef": 100 * float(stats.spearmanr(*pairs).statistic),
    }


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum as T5 computes them, save for its bootstrap.

    The words are those of `words.words`: of ASCII the same; of other scripts T5 has none. XL-Sum
    (Hasan et al. 2021) divides Chinese, Japanese and Thai by dictionaries; here their characters
    are compared, as in LCSTS (Hu et al. 2015), which needs none.

    Args:
        targets: the summaries; " . " ends a sentence, which matters for Lsum.
        predictions: one for each.

    Returns:
        {"rouge1", "rouge2", "rougeLsum"}: the means of the F1.

    Raises:
        ValueError: no summaries, or another number of predictions.
    """
    check_pairs(targets, predictions)
    scorer = _rouge_scorer()
    scores = [
        scorer.score(_sentences(target), _sentences(prediction))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return _mean_f1(scores)


class _Words:
    """A tokenizer, as `rouge_score` has them."""

    tokenize = staticmethod(words)


def _rouge_scorer():
    with needs():  # Here: only summaries and image captions need it.
        from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(_ROUGE_TYPES, tokenizer=_Words())


def _mean_f1(scores: Sequence[Mapping]) -> dict[str, float]:
    """Means over the examples, in per cent."""
    return {
        name: 100 * sum(score[name].fmeasure for score in scores) / len(scores)
        for name in _ROUGE_TYPES
    }


def rouge_of_any(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum, of each prediction with the target that it is closest to.

    Args:
        targets: several right texts for each.
        predictions: one for each.

    Returns:
        {"rouge1", "rouge2", "rougeLsum"}: the means of the F1.

    Raises:
        ValueError: no texts, or another number of predictions.
    """
    check_pairs(targets, predictions)
    scorer = _rouge_scorer()
    scores = [scorer.score_multi(*pair) for pair in zip(targets, predictions, strict=True)]
    return _mean_f1(scores)


def anls(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Average normalised Levenshtein similarity, DocVQA's metric (Biten et al. 2019).

    For each question the best 1 - d over its answers, d the distance by the length of the longer
    text, in lower case and with single spaces; 0 where d is not below one half. A letter is one
    however it is composed.

    Args:
        targets: the right answers of each question.
        predictions: one for each question.

    Returns:
        {"anls"}.

    Raises:
        ValueError: no questions, or another number of predictions.
    """
    check_pairs(targets, predictions)
    total = 0.0
    for answers, prediction in zip(targets, predictions, strict=True):
        total += max(_similarity(answer, prediction) for answer in answers)
    return {"anls": 100 * total / len(targets)}


def _similarity(answer: str, prediction: str) -> float:
    first, second = (" ".join(_composed(x).lower().split()) for x in (answer, prediction))
    longer = max(len(first), len(second))
    distance = levenshtein(first, second)
    return 1 - distance / max(longer, 1) if 2 * distance < max(longer, 1) else 0.0


def _composed(text: str) -> str:
    """The text in Unicode's normal form C: letters that look the same are the same."""
    return unicodedata.normalize("NFC", text)


def transcript_errors(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Word and character error rate: edits from all targets to the predictions by their length.

    A letter is one character, however it is composed.

    Args:
        targets: the right transcripts.
        predictions: one for each.

    Returns:
        {"wer", "cer"}; above 100 where the predictions have many insertions.

    Raises:
        ValueError: no transcripts, another number of predictions, or not one word in the targets.
        ImportError: the extra `speech` is not installed.
    """
    with needs("speech"):  # Here: only speech needs it.
        import jiwer

    check_pairs(targets, predictions)
    if not any(target.split() for target in targets):
        raise ValueError(f"All {len(targets)} targets are empty: there is no error rate")
    targets, predictions = list(map(_composed, targets)), list(map(_composed, predictions))
    return {
        "wer": 100 * jiwer.wer(targets, predictions),
        "cer": 100 * jiwer.cer(targets, predictions),
    }


def levenshtein(first: str, second: str) -> int:
    """Returns the fewest insertions, deletions and replacements from one text to the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _sentences(text: str) -> str:
    """Puts each sentence on a line of its own, where ROUGE-Lsum looks for it."""
    return text.replace(" . ", " .\n")


def check_pairs(targets: Sequence, predictions: Sequence) -> None:
    """Raises ValueError unless there is a prediction for each of at least one target."""
    if not targets or len(targets) != len(predictions):
        raise ValueError(
            f"A prediction is needed for each of at least one target: there are {len(targets)} "
            f"targets and {len(predictions)} predictions"
        )
