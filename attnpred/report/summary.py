"""What the rows say together: a line about what they are, tables of who is best and who is like the full cache, and notes.

"Best" is the best mean, and how many cannot be told from it stands beside it. "Within noise" says that the 95 % interval of
the paired difference holds 0: with few items it is wide, and it proves no equality.
"""

from collections import Counter
from collections.abc import Sequence

from attnpred.report.places import Column, Place, is_bound
from attnpred.report.rows import Row
from attnpred.report.tables import Table, table
from attnpred.report.words import BETTER, WITHIN, WORSE, counted, listed, measured, verdict

FEW = 10
"""Items below which an interval by bootstrap is not to be trusted."""


def lead(rows: Sequence[Row]) -> str:
    """Return what the rows are."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    policies = dict.fromkeys(row.policy for row in rows if not row.is_full)
    models = list(dict.fromkeys(row.model for row in rows))
    commits = sorted({_short(str(row.raw["commit"])) for row in rows if row.raw.get("commit")})
    made = f", made at commit {listed(commits)}" if commits else ", which do not say at what commit they were made"
    return (
        f"{counted(len(rows), 'row')}{made}: {counted(len(policies), 'policy', 'policies')} besides the full cache, on "
        f"{listed(tasks)}, with {listed(models)}."
    )


def notes(rows: Sequence[Row], found: Sequence[Place]) -> list[str]:
    """Return what has to be known to read the figures, a sentence or two each."""
    lines = []
    if any(not row.is_full and row.against is not None for row in rows):
        lines.append(
            "Within noise: the 95 % interval of the difference from the full cache, item by item, holds 0. That is no proof "
            "of equality: the interval says how large the loss may be."
        )
    else:
        lines.append("No row has a paired comparison with the full cache, so nothing is said about losses against it.")
    if any(is_bound(row) for row in rows):
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


def policy_table(found: Sequence[Place]) -> Table:
    """Return the table over all places: how often each policy is best, and how it compares with the full cache."""
    best: Counter[str] = Counter()
    measured_at: Counter[str] = Counter()
    against: Counter[tuple[str, str]] = Counter()
    for place in found:
        for column in place.columns:
            for name in winners(place, column):
                best[name] += 1
        for (name, _), row in place.cells.items():
            measured_at[name] += 1
            against[name, verdict(row)] += 1
    lines = [
        [name, str(best[name]), str(cells), *(str(against[name, word]) for word in (WITHIN, WORSE, BETTER))]
        for name, cells in sorted(measured_at.items(), key=lambda pair: (-best[pair[0]], -against[pair[0], WITHIN]))
    ]
    caption = (
        "All policies over all tasks and budgets: how often a policy has the best mean, alone or shared; of how many results; "
        "and how many of these are within noise of the full cache, worse, and better"
    )
    return table("policies", caption, ["policy", "best", "results", WITHIN, WORSE, BETTER], lines)


def best_table(place: Place, name: str) -> Table:
    """Return the table of who is best at each budget of a place, and how sure that is."""
    return table(
        name,
        f"{place.name}: the best {place.metric} at each budget, how many other policies have an interval that overlaps its, "
        "and how many policies are within noise of the full cache",
        ["budget", "best mean", "value and interval", "n", "not told apart", "like the full cache"],
        [_best(place, column) for column in place.columns],
    )


def winners(place: Place, column: Column) -> list[str]:
    """Return the policies with the best mean at a budget, where there are two to compare."""
    ranked = place.rivals(column)
    return [name for name, row in ranked if row.value == ranked[0][1].value] if len(ranked) > 1 else []


def _best(place: Place, column: Column) -> list[str]:
    ranked = place.rivals(column)
    if not ranked:
        return [column.words, "only the oracle was measured", "", "", "", ""]
    name, row = ranked[0]
    same = sum(other.value == row.value for _, other in ranked[1:])
    others = len(ranked) - 1
    compared = [other for _, other in ranked if other.against is not None]
    like = sum(verdict(other) == WITHIN for other in compared)
    return [
        column.words,
        f"{name} and {same} more" if same else name,
        measured(row),
        f"{row.n:,}" if row.n is not None else "not known",
        f"{len(_unseparated(ranked))} of {others}" if others and row.interval else "not known" if others else "the only one",
        f"{like} of {len(compared)}" if compared else "not measured",
    ]  # fmt: skip


def _short(commit: str) -> str:
    return commit[:9] + ("+" if commit.endswith("+") else "")  # +: files differed from it


def _unseparated(ranked: Sequence[tuple[str, Row]]) -> list[str]:
    best = ranked[0][1].interval
    if best is None:
        return []
    return [
        name for name, row in ranked[1:] if row.interval and row.interval[0] <= best[1] and best[0] <= row.interval[1]
    ]
