r"""Final answers of mathematical problems: found in a solution, and compared.

Two answers are the same if their normal forms are, or if both are numbers of the same value. The normal form drops what
does not change the value in the answers of MATH (arXiv 2103.03874): spaces, \left and \right, units, signs of money,
degrees and percent, the left side of `x = ...`; and writes what can be written in several ways in one: \dfrac12, 1/2.
Nothing is computed: 2 + 2 is not 4, and (1, 2) is not (2, 1).
"""

import re
from fractions import Fraction

_DROPPED = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\big[lr]?(?![a-z])|\\[!,;: ]|~|\\(?:quad|displaystyle)(?![a-z])"
    r"|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\\degree|°|\\?%|\\?\$"
)
_UNIT = re.compile(r"(?<=[\d}.])\s*\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}(?:\s*\^\s*(?:\{\d\}|\d))?\s*$")
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf)\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(?:\{([^{}]*)\}|(\d))(?:\{([^{}]*)\}|(\d))")
_SLASH = re.compile(r"(?<![\w).])(-?)(\d+)/(\d+)(?![\w{(.])")
_NUMBER = re.compile(r"([+-]?)(?:(\d+)?\\frac\{(\d+)\}\{(\d+)\}|(\d*\.?\d+|\d+\.))")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_SAID = re.compile(r"answer(?:\s+is)?\s*[:=]?\s*(.+)", re.IGNORECASE)


def boxed(text: str) -> str | None:
    r"""Return what stands in the last whole \boxed{...}, braces inside it included; None if there is none."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for i, mark in enumerate(text[start:], start):
            if text[i - 1] != "\\":
                depth += (mark == "{") - (mark == "}")
            if not depth:
                return text[start:i].strip()
    return None


def final_answer(text: str) -> str:
    """Return the box; else what follows the last "answer is", to the end of its sentence; else the last number; else ""."""
    found = boxed(text)
    if found is not None:
        return found
    said = _SAID.findall(text)
    if said:
        return re.split(r"\.(?:\s|$)", said[-1])[0].strip()
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1] if numbers else ""


def normal(answer: str) -> str:
    """Return the normal form."""
    text = _UNIT.sub("", answer.strip().rstrip(".").strip().strip("$"))
    text = text.replace("\\\\", ";")  # ends a row of a matrix; "\\ " is a space
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", _DROPPED.sub("", text))
    text = _UNIT.sub("", text)
    text = re.sub(r"\s+", "", _WORDS.sub(r"\1", text))
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^[a-zA-Z]\w?(?:=|\\in(?![a-z]))", "", text)
    text = _SHORT_FRACTION.sub(lambda m: rf"\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    text = _SLASH.sub(r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    text = re.sub(r"\{[pbv]matrix\}", "{matrix}", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    choice = re.fullmatch(r"\(([A-Za-z]|\d+)\)", text)
    return choice[1] if choice else text


def number(answer: str) -> Fraction | None:
    """Return the value of a normal form that is a whole, decimal, common or mixed number; None for anything else."""
    match = _NUMBER.fullmatch(answer)
    if match is None:
        return None
    sign, whole, above, below, plain = match.groups()
    if plain is not None:
        value = Fraction(plain.rstrip("."))
    elif int(below) == 0:
        return None
    else:
        value = int(whole or 0) + Fraction(int(above), int(below))
    return -value if sign == "-" else value


def same_answer(a: str, b: str) -> bool:
    """Return whether two answers are the same."""
    left, right = normal(a), normal(b)
    value = number(left)
    return bool(left) and (left == right or (value is not None and value == number(right)))
