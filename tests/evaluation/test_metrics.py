"""Known answers of every score, and normal forms of LaTeX."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnpred.evaluation import metrics
from attnpred.evaluation.latex import boxed, final_answer, normal, number, same_answer


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("The Mill, of course!", "mill", 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # "mill of course": 1 of 3 right, 1 of 1 found
        ("a mill", "The mill.", 1.0),
        ("red red blue", "red blue blue", 2 / 3),  # a word counts as often as it stands in both
        ("", "mill", 0.0),
        ("the", "a", 0.0),  # nothing is left of either
        ("river", "mill", 0.0),
    ],
)
def test_qa_f1(answer: str, truth: str, score: float) -> None:
    assert metrics.qa_f1(answer, truth) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        # Lin 2004, section 3.1: "police killed the gunman" against two answers with the same words
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("one two three", "one two three four five six", 2 * 1 * 0.5 / 1.5),
        ("one one one two", "one two", 1.0),  # a word counts once
        ("two. one.", "one. two.", 1.0),  # sentences are united
        ("", "one", 0.0),
    ],
)
def test_rouge_l(answer: str, truth: str, score: float) -> None:
    pytest.importorskip("rouge")
    assert metrics.rouge_l(answer, truth) == pytest.approx(score)


CLASSES = ("Distance", "Distance, linear measure", "Date")


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("Distance, linear measure", "Distance, linear measure", 1.0),  # "Distance" is only a part of its name
        ("Distance, linear measure or Date", "Distance, linear measure", 1 / 2),
        ("Distance", "Distance, linear measure", 0.0),
        ("Distance, linear measure", "Distance", 1 / 2),
        ("", "Date", 0.0),
    ],
)
def test_classification(answer: str, truth: str, score: float) -> None:
    assert metrics.classification(answer, truth, CLASSES) == score


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("return a + b", "return a + b", 1.0),
        ("\n# adds\n```python\nreturn a\nreturn b", "return a", 1.0),  # the first line that is neither comment nor mark
        ("// adds\n# more", "return a", 0.0),
        ("kitten", "sitting", 0.62),  # "itt" and "n" are common: 8/13
        ("abc", "", 0.0),
    ],
)
def test_edit_similarity(answer: str, truth: str, score: float) -> None:
    assert metrics.edit_similarity(answer, truth) == pytest.approx(score)


def test_numbers_are_counted_among_all_that_are_named() -> None:
    assert metrics.retrieval("Paragraph 7", "Paragraph 7") == 1
    assert metrics.retrieval("Paragraph 7, not 17 or 1", "Paragraph 7") == pytest.approx(1 / 3)
    assert metrics.retrieval("none of them", "Paragraph 7") == 0
    assert metrics.count("12", "12") == 1 and metrics.count("2 or 12", "12") == 0.5
    assert metrics.count("", "12") == 0 and metrics.count("112", "12") == 0


def test_outputs_are_found_in_either_case() -> None:
    assert metrics.all_found("it is ABC-1, and 22.", ["abc-1", "22", "33"]) == pytest.approx(2 / 3)
    assert metrics.any_found("it is ABC-1", ["zzz", "abc-1"]) == 1
    assert metrics.any_found("it is ABC-1", ["zzz"]) == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{3} and \boxed{4", "3"),  # the last one never closes
        (r"\fbox{3}", None),
    ],
)
def test_the_last_whole_box(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


def test_an_answer_without_a_box() -> None:
    assert final_answer("We add. The answer is 3.5. That was all.") == "3.5"
    assert final_answer("First 4, then 1,200 in all") == "1,200"
    assert final_answer("I do not know") == ""


SAME = [
    (r"\dfrac12", r"\frac{1}{2}"),
    ("1/2", r"\tfrac 1 2"),
    ("0.5", r"\frac{1}{2}"),
    (".5", "0.50"),
    (r"137 \frac{1}{2}", "137.5"),
    ("-3/4", r"-\frac{3}{4}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac\pi2)".replace(r"\frac\pi2", r"\frac{\pi}{2}")),
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90\text{ degrees}"),
    (r"15\mbox{ cm}^2", "15"),
    (r"\$36", "36"),
    (r"50\%", "50"),
    (r"11,\! 111", "11111"),
    ("10,080", "10080"),
    ("x = 5", "5"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    (r"\textbf{(073)}", "73"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{bmatrix}\frac15\\-\frac{18}5\end{bmatrix}"),
    ("$7$", "7."),
]
OTHER = [
    ("1/2", "2"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    (r"\sqrt{2}", "2"),
    ("-4", "4"),
    ("12", "1,2"),
    ("east", "west"),
    ("", ""),  # no answer is not an answer
    (r"\frac{1}{0}", "0"),
    ("x+1", "1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_the_same_answers(a: str, b: str) -> None:
    assert same_answer(a, b) and same_answer(b, a), (normal(a), normal(b))


@pytest.mark.parametrize(("a", "b"), OTHER)
def test_other_answers(a: str, b: str) -> None:
    assert not same_answer(a, b), (normal(a), normal(b))


@given(st.integers(-50, 50), st.integers(1, 50))
def test_fractions_have_their_value(above: int, below: int) -> None:
    sign = "-" if above < 0 else ""
    for text in (f"{above}/{below}", rf"{sign}\dfrac{{{abs(above)}}}{{{below}}}"):
        assert number(normal(text)) == Fraction(above, below)
