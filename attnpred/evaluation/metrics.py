"""Scores of an answer against the truth, from 0 to 1: those of LongBench (arXiv 2308.14508) and RULER (arXiv 2404.06654).

They give what the packages give that LongBench is published with. `rouge_l` is that of the package `rouge` itself (extra
`eval`), which counts every word once and unites sentences. `edit_similarity` is what fuzzywuzzy gives by itself: difflib's
ratio, in whole hundredths; with python-Levenshtein installed it would give another figure.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from importlib.util import find_spec

from attnpred.errors import missing_extra

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return `text` in lower case without punctuation, articles and double spaces (as SQuAD compares answers)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def qa_f1(answer: str, truth: str) -> float:
    """Return the F1 of the normalised words, each as often as it stands there."""
    given, wanted = normalised(answer).split(), normalised(truth).split()
    return _f_measure((Counter(given) & Counter(wanted)).total(), len(given), len(wanted))


def need_rouge() -> None:
    """Raise `MissingExtraError` unless `rouge_l` can be had: to be asked before anything long."""
    if find_spec("rouge") is None:
        raise missing_extra("rouge", "eval")


def rouge_l(answer: str, truth: str) -> float:
    """Return the F of ROUGE-L; 0 where the package gives none, as for an empty text. Raises as `need_rouge`."""
    need_rouge()
    from rouge import Rouge

    try:
        [found] = Rouge(["rouge-l"]).get_scores([answer], [truth])
    except (ValueError, RecursionError):  # no words; a sentence of a thousand words
        return 0.0
    return float(found["rouge-l"]["f"])


def classification(answer: str, truth: str, classes: Sequence[str]) -> float:
    """Return one over the number of classes that are named, if the true one is among them.

    A class whose name is a part of the true class's name does not count as named.
    """
    named = [name for name in classes if name in answer and (name == truth or name not in truth)]
    return 1 / len(named) if truth in named else 0.0


def edit_similarity(answer: str, truth: str) -> float:
    """Return the similarity of the first line that is code, in whole hundredths.

    A line with "`", "#" or "//" in it is taken for a comment or the mark of a code block.
    """
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, code, truth).ratio()) / 100 if code and truth else 0.0


def retrieval(answer: str, truth: str) -> float:
    """Return which share of the numbers in `answer` is that of the true paragraph ("Paragraph 7")."""
    return count(answer, truth.strip().removeprefix("Paragraph").strip())


def count(answer: str, truth: str) -> float:
    """Return which share of the numbers in `answer` is the true one."""
    numbers = re.findall(r"\d+", answer)
    return sum(number == truth.strip() for number in numbers) / len(numbers) if numbers else 0.0


def all_found(answer: str, wanted: Sequence[str]) -> float:
    """Return which share of `wanted` stands in `answer`, upper or lower case (RULER: string match all)."""
    return sum(text.lower() in answer.lower() for text in wanted) / len(wanted)


def any_found(answer: str, wanted: Sequence[str]) -> float:
    """Return 1 if one of `wanted` stands in `answer`, upper or lower case (RULER: string match part)."""
    return float(any(text.lower() in answer.lower() for text in wanted))


def _f_measure(common: int, given: int, wanted: int) -> float:
    return 2 * common / (given + wanted) if common else 0.0
