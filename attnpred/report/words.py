"""Numbers in words, the same everywhere; a difference is never written without its interval."""

from attnpred.report.rows import Against, Row

MINUS = "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Return a value with as many digits as are of use."""
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"


def measured(row: Row) -> str:
    """Return a row's value and its interval."""
    if row.is_empty:
        return "nothing measured"
    if row.interval is None:
        return f"{number(row.value)} (no interval)"
    return f"{number(row.value)} [{number(row.interval[0])}, {number(row.interval[1])}]"


def difference(against: Against) -> str:
    """Return a difference and its interval, with signs."""
    return f"{_signed(against.difference)} [{_signed(against.low)}, {_signed(against.high)}]"


def verdict(row: Row) -> str:
    """Return how a row compares with the full cache: within noise, worse or better; "" if that was not measured."""
    if row.against is None:
        return ""
    if row.against.low <= 0 <= row.against.high:
        return WITHIN
    return BETTER if (row.against.difference < 0) == row.lower_is_better else WORSE


WITHIN, WORSE, BETTER = "within noise", "worse", "better"


def counted(count: int, one: str, many: str = "") -> str:
    """Return a count and its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(names: list[str]) -> str:
    """Return names as a sentence lists them."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _signed(value: float) -> str:
    words = number(abs(value))
    return words if float(words.replace(",", "")) == 0 else ("+" if value > 0 else MINUS) + words
