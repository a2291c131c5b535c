"""Metrics of the language tasks, in per cent: SQuAD's and ReCoRD's exact match and F1, and ROUGE.

They are seqio metric functions, of all targets and predictions, which the postprocessors here make
of texts. Accuracy is `coda_jax.data.accuracy`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import re
import string

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
    _check(targets, predictions)
    em = f1 = 0.0
    for number, (answers, prediction) in enumerate(zip(targets, predictions, strict=True)):
        if not answers:
            raise ValueError(f"The question number {number} has no answers.")
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
    _check(targets, predictions)
    questions: dict = {}
    for target, prediction in zip(targets, predictions, strict=True):
        questions.setdefault(target["group"], (target["answers"], prediction))
    answers, firsts = zip(*questions.values(), strict=True)
    return squad(answers, firsts)


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum as T5 computes them, save for its bootstrap.

    Args:
      targets: the summaries; " . " ends a sentence, which matters for Lsum.
      predictions: one for each.

    Returns:
      {"rouge1", "rouge2", "rougeLsum"}: the means of the F1.

    Raises:
      ValueError: no summaries, or another number of predictions.
    """
    from rouge_score import rouge_scorer  # Here: only summaries need it.

    _check(targets, predictions)
    scorer = rouge_scorer.RougeScorer(_ROUGE_TYPES)
    scores = [
        scorer.score(_sentences(target), _sentences(prediction))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {
        name: 100 * sum(score[name].fmeasure for score in scores) / len(scores)
        for name in _ROUGE_TYPES
    }


def _sentences(text: str) -> str:
    """Puts each sentence on a line of its own, where ROUGE-Lsum looks for it."""
    return text.replace(" . ", " .\n")


def _check(targets: Sequence, predictions: Sequence) -> None:
    if not targets or len(targets) != len(predictions):
        raise ValueError(
            f"A prediction is needed for each of at least one target: there are {len(targets)} "
            f"targets and {len(predictions)} predictions."
        )
