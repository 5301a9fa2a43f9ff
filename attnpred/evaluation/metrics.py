"""Scores of an answer against the truth, from 0 to 1: those of LongBench (arXiv 2308.14508) and RULER (arXiv 2404.06654).

Two of them differ from the packages that are used there. `rouge_l` takes the longest common subsequence of the whole
texts, where the `rouge` package unites those of single sentences; texts of one sentence get the same F. `edit_similarity`
counts insertions and deletions, as fuzzywuzzy does when python-Levenshtein is installed; without it difflib takes
its place, whose matching blocks may be shorter than the longest common subsequence, so that its ratio is never larger.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return `text` in lower case without punctuation, articles and double spaces (as SQuAD compares answers)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def qa_f1(answer: str, truth: str) -> float:
    """Return the F1 of the normalised words, each as often as it stands there."""
    given, wanted = normalised(answer).split(), normalised(truth).split()
    return _f_measure((Counter(given) & Counter(wanted)).total(), len(given), len(wanted))


def rouge_l(answer: str, truth: str) -> float:
    """Return the F-measure of the longest common subsequence of words (ROUGE-L, Lin 2004)."""
    given, wanted = answer.split(), truth.split()
    return _f_measure(common_length(given, wanted), len(given), len(wanted))


def classification(answer: str, truth: str, classes: Sequence[str]) -> float:
    """Return one over the number of classes that are named, if the true one is among them.

    A class whose name is a part of the true class's name does not count as named.
    """
    named = [name for name in classes if name in answer and (name == truth or name not in truth)]
    return 1 / len(named) if truth in named else 0.0


def edit_similarity(answer: str, truth: str) -> float:
    """Return the similarity of the first line that is code, in whole hundredths: 2 x common characters / all characters.

    A line with "`", "#" or "//" in it is taken for a comment or the mark of a code block.
    """
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not code or not truth:
        return 0.0
    return round(100 * _f_measure(common_length(code, truth), len(code), len(truth))) / 100


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


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two lists of words, or of the characters of two texts.

    The last row of the table is held as one whole number of len(a) bits (Hyyrö 2004), so long texts take no time.
    """
    places: dict[str, int] = {}
    for i, part in enumerate(a):
        places[part] = places.get(part, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every  # a bit is 0 where the longest length grows
    for part in b:
        hits = row & places.get(part, 0)
        row = ((row + hits) | (row - hits)) & every
    return len(a) - row.bit_count()


def _f_measure(common: int, given: int, wanted: int) -> float:
    return 2 * common / (given + wanted) if common else 0.0
