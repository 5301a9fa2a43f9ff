"""The summary in words: which policy is best at each budget, and which are within noise of the full cache.

Every sentence is made from rows. "Best" is the best mean, and who cannot be told from it is named beside it. "Within
noise" says that the 95 % interval of the paired difference holds 0: with few items it is wide, and it proves no equality.
"""

from collections import Counter
from collections.abc import Sequence

from attnpred.report.places import Column, Place
from attnpred.report.rows import Row
from attnpred.report.words import BETTER, WITHIN, WORSE, counted, difference, listed, measured, verdict

FEW = 10
"""Items below which an interval by bootstrap is not to be trusted."""


def headline(rows: Sequence[Row], found: Sequence[Place]) -> list[str]:
    """Return what holds for all rows together."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    policies = dict.fromkeys(row.policy for row in rows if not row.is_full)
    models = list(dict.fromkeys(row.model for row in rows))
    commits = sorted({_short(str(row.raw["commit"])) for row in rows if row.raw.get("commit")})
    made = f", made at commit {listed(commits)}" if commits else ", which do not say at what commit they were made"
    lines = [
        f"{counted(len(rows), 'row')}{made}: {counted(len(policies), 'policy', 'policies')} besides the full cache, on "
        f"{listed(tasks)}, with {listed(models)}."
    ]
    lines += _wins(found)
    lines += _noise(rows)
    if any(row.policy.partition(":")[0] == "oracle" for row in rows):
        lines.append("The oracle knows the true attention: it shows what is possible, and is never counted as best.")
    empty = sum(row.is_empty for row in rows)
    if empty:
        lines.append(f"{counted(empty, 'row')} had no items, so nothing was measured: only in the table of every row.")
    few = sum(row.n is not None and 0 < row.n < FEW for row in rows)
    if few:
        lines.append(
            f"{counted(few, 'row')} had fewer than {FEW} items: intervals by bootstrap are too narrow there, and of no width "
            "where all items are alike."
        )
    hidden = sum(place.hidden for place in found)
    if hidden:
        lines.append(f"{counted(hidden, 'row')} measured again with the same settings: the last one of each is drawn.")
    return lines


def sentences(place: Place) -> list[str]:
    """Return what holds at each budget of one place."""
    lines = [f"Full cache: {_with_n(place.full)}."] if place.full else ["The full cache was not measured here."]
    return lines + [f"At {column.words}: {_best(place, column)}{_like_full(place, column)}" for column in place.columns]


def _wins(found: Sequence[Place]) -> list[str]:
    first: Counter[str] = Counter()
    close = 0
    for place in found:
        for column in place.columns:
            ranked = place.rivals(column)
            if len(ranked) > 1 and ranked[0][1].value != ranked[1][1].value:
                first[ranked[0][0]] += 1
                close += bool(_unseparated(ranked))
    if not first:
        return []
    won = listed([f"{name} {counted(count, 'time')}" for name, count in first.most_common()])
    return [
        f"Best mean at a budget of a task: {won}. In {close} of these {first.total()} cases another policy's interval "
        "overlaps that of the best, so the order there is not settled."
    ]


def _noise(rows: Sequence[Row]) -> list[str]:
    verdicts = [(row.policy, verdict(row)) for row in rows if not row.is_full and row.against is not None]
    if not verdicts:
        return ["No row has a paired comparison with the full cache, so nothing is said about losses against it."]
    total = Counter(words for _, words in verdicts)
    policies = dict.fromkeys(policy for policy, _ in verdicts)
    own = [
        f"{policy} {sum(p == policy and v == WITHIN for p, v in verdicts)} of {sum(p == policy for p, _ in verdicts)}"
        for policy in policies
    ]
    return [
        f"Against the full cache, item by item: of {counted(len(verdicts), 'comparison')} {total[WITHIN]} are within noise, "
        f"{total[WORSE]} worse and {total[BETTER]} better. Within noise: {listed(own)}. That the 95 % interval of a "
        "difference holds 0 is no proof of equality: the interval says how large the loss may be."
    ]


def _best(place: Place, column: Column) -> str:
    ranked = place.rivals(column)
    if not ranked:
        return "only the oracle was measured."
    name, row = ranked[0]
    if len(ranked) == 1:
        return f"{name}, the only policy here, has {_with_n(row)}."
    same = [other for other, found in ranked[1:] if found.value == row.value]
    if same:
        return f"{listed([name, *same])} share the best mean, {_with_n(row)}."
    close = _unseparated(ranked)
    if row.interval is None:
        return f"{name} has the best mean, {_with_n(row)}."
    who = f"that of {listed(close)}" if close else "no other policy's"
    return f"{name} has the best mean, {_with_n(row)}; its interval overlaps {who}."


def _with_n(row: Row) -> str:
    return measured(row) + (f" (n = {row.n:,})" if row.n is not None else "")


def _short(commit: str) -> str:
    return commit[:9] + ("+" if commit.endswith("+") else "")  # +: files differed from it


def _unseparated(ranked: Sequence[tuple[str, Row]]) -> list[str]:
    best = ranked[0][1].interval
    if best is None:
        return []
    return [
        name for name, row in ranked[1:] if row.interval and row.interval[0] <= best[1] and best[0] <= row.interval[1]
    ]


def _like_full(place: Place, column: Column) -> str:
    compared = [(name, row) for name, row in place.rivals(column) if row.against is not None]
    if not compared:
        return ""
    near = [f"{name} ({difference(row.against)})" for name, row in compared if row.against and verdict(row) == WITHIN]
    if not near:
        return " None is within noise of the full cache."
    return f" Within noise of the full cache: {listed(near)}."
