"""What the page says about the rows: sentences under pictures and tables, which the rows bear out."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from attnpred.report.leading import MOST, leading, ordered
from attnpred.report.look import looks
from attnpred.report.page import build
from attnpred.report.places import Place, places
from attnpred.report.results import against_budget, against_cost, names
from attnpred.report.summary import best_table, lead, notes, policy_table
from attnpred.report.tables import Table
from tests.report.test_report_page import raw, rows

SVG = "{http://www.w3.org/2000/svg}"
SAME = {"difference": -0.1, "interval": [-0.3, 0.1]}
WORSE = {"difference": -0.15, "interval": [-0.2, -0.1]}


def words(found: Table) -> list[list[str]]:
    return [[cell.words for cell in row] for row in found.rows]


def under(place: Place) -> list[str]:
    look = looks(names([place]))
    return [made.words for made in (*against_budget(place, look, "b"), *against_cost(place, look, "c"))]


def test_tables_say_who_is_best_and_who_is_like_the_full_cache(tmp_path: Path) -> None:
    given = rows(
        tmp_path, raw(policy="full", budget=None, value=0.9, interval=[0.8, 1]), raw(policy="oracle", value=1),
        raw(policy="quest", value=0.8, interval=[0.7, 0.9], against_full=SAME),
        raw(policy="ema", value=0.75, interval=[0.7, 0.8], against_full=WORSE),
        raw(policy="h2o", value=0.1, interval=[0, 0.2], against_full=WORSE, n=4),
    )  # fmt: skip
    (place,) = places(given)
    assert words(best_table(place, "t")) == [["25 %", "quest", "0.800 [0.700, 0.900]", "20", "1 of 2", "1 of 3"]]
    assert words(policy_table([place])) == [
        ["quest", "1", "1", "1", "0", "0"],
        ["oracle", "0", "1", "0", "0", "0"],
        ["ema", "0", "1", "0", "1", "0"],
        ["h2o", "0", "1", "0", "1", "0"],
    ]
    told = notes(given, [place])
    assert any("1 row had fewer than 10 items" in line for line in told)
    assert any("oracle" in line and "never counted as best" in line for line in told)
    assert "5 rows" in lead(given) and "4 policies besides the full cache, on t, with m" in lead(given)


def test_where_lower_is_better_more_is_worse(tmp_path: Path) -> None:
    more = {"difference": 0.2, "interval": [0.1, 0.3]}
    given = rows(tmp_path, raw(lower_is_better=True, against_full=more), raw(policy="quest", value=0.4, interval=[0.3, 0.45], lower_is_better=True))  # fmt: skip
    (place,) = places(given)
    assert words(best_table(place, "t"))[0][1] == "quest"
    assert ["ema", "0", "1", "0", "1", "0"] in words(policy_table([place]))
    assert under(place)[0].startswith("Lower is better: quest has the best mean")


def grid(tmp_path: Path, **costs: Any) -> Place:
    """Two policies at three budgets: quest is best at two, and within noise of the full cache at the largest two."""
    values = {"quest": {0.5: (0.9, SAME), 0.25: (0.8, SAME), 0.125: (0.1, WORSE)},
              "ema": {0.5: (0.8, WORSE), 0.25: (0.5, WORSE), 0.125: (0.2, SAME)}}  # fmt: skip
    given = [raw(policy="full", budget=None, value=0.9, bytes_per_step=800.0, **costs)]
    for policy, own in values.items():
        for budget, (value, against) in own.items():
            more = 100 * (policy == "quest")  # as digests that are read
            given.append(
                raw(policy=policy, budget=budget, value=value, against_full=against, bytes_per_step=800 * budget + more)
            )
    (place,) = places(rows(tmp_path, *given))
    return place


def test_one_sentence_under_each_picture(tmp_path: Path) -> None:
    budget, cost = under(grid(tmp_path))
    assert budget == (
        "Higher is better: quest has the best mean, alone or shared, at 2 of 3 budgets; it is within noise of the full cache "
        "down to 25 %."
    )
    assert cost == (
        "Higher is better: the cheapest within noise of the full cache is ema at 12.5 %, with 8.0 times fewer bytes read per "
        "decode step than the full cache."
    )


def test_without_the_full_cache_the_sentence_names_the_ends_of_the_front(tmp_path: Path) -> None:
    given = [raw(policy=name, value=value, ms_per_token=ms) for name, value, ms in (("a", 0.2, 1.0), ("b", 0.9, 3.0), ("c", 0.1, 2.0))]  # fmt: skip
    (place,) = places(rows(tmp_path, *given))
    assert under(place)[1] == "Higher is better: the front goes from a at 25 % to b at 25 %."
    (place,) = places(rows(tmp_path, *given[1:]))
    assert "the front goes from c at 25 % to b at 25 %" in under(place)[1]
    (place,) = places(rows(tmp_path, given[0], given[2]))
    assert under(place)[1] == "Higher is better: a at 25 % is both cheapest and best."


def test_a_policy_that_is_worse_at_the_largest_budget_is_called_so(tmp_path: Path) -> None:
    given = [raw(policy="full", budget=None, value=0.9), raw(policy="ema", against_full=WORSE), raw(policy="h2o", value=0.1, against_full=WORSE)]  # fmt: skip
    (place,) = places(rows(tmp_path, *given))
    assert (
        under(place)[0] == "Higher is better: ema has the best mean at 25 %; it is worse than the full cache at 25 %."
    )


def test_who_shares_the_best_mean_is_named_with_ours_first(tmp_path: Path) -> None:
    given = [raw(policy=name, value=0.5) for name in ("a", "predicted", "b")]
    (place,) = places(rows(tmp_path, *given))
    assert under(place)[0] == "Higher is better: predicted, a and b share the best mean at 25 %."


def many(tmp_path: Path) -> Place:
    given = [raw(policy=f"p{i}", value=i / 20) for i in range(12)]
    given += [raw(policy=f"p11:way={i}", value=0.9 + i / 100) for i in range(3)]
    given += [raw(policy="predicted", value=0.0), raw(policy="oracle", value=1)]
    (place,) = places(rows(tmp_path, *given, *(one | {"budget": 0.5} for one in given)))
    return place


def test_the_best_of_each_policy_have_lines_of_their_own_and_the_others_are_grey(tmp_path: Path) -> None:
    place = many(tmp_path)
    own = leading(place)
    assert own == ["p6", "p7", "p8", "p9", "p10", "p11:way=2", "predicted", "oracle"] and len(own) == MOST + 1
    assert ordered([place])[0] == "predicted" and set(ordered([place])[:8]) == set(own)
    chart = against_budget(place, looks(names([place])), "b")[0].svg
    assert "9 more policies" in chart and "p11:way=2" in chart and "p11:way=1" not in chart
    few = leading(grid(tmp_path))
    assert few == ["quest", "ema"], "where there is room, all have one"


def test_rows_on_other_documents_stand_apart(tmp_path: Path) -> None:
    given = rows(
        tmp_path, raw(inputs="aa"), raw(policy="full", budget=None, inputs="aa"), raw(policy="quest", inputs="bb"), raw()
    )  # fmt: skip
    found = places(given)
    assert [place.name for place in found] == [
        "t, 64 tokens, m, documents aa", "t, 64 tokens, m, documents bb", "t, 64 tokens, m, documents without a name",
    ]  # fmt: skip
    assert found[0].full is not None and found[1].full is None
    (alone,) = places(given[:2])
    assert alone.name == "t, 64 tokens, m"


def test_with_one_budget_each_policy_has_a_line_of_its_own_best_first(tmp_path: Path) -> None:
    given = [raw(policy="full", budget=None, value=0.9), *(raw(policy=f"p{i}", value=i / 10) for i in range(9))]
    (place,) = places(rows(tmp_path, *given))
    (chart,) = against_budget(place, looks(names([place])), "b")
    root = ET.fromstring(chart.svg)
    texts = {"".join(text.itertext()): float(text.get("y", 0)) for text in root.iter(f"{SVG}text")}
    assert sorted((f"p{i}" for i in range(9)), key=texts.__getitem__) == [f"p{i}" for i in reversed(range(9))]
    assert "full cache" in texts and "accuracy at a budget of 25 %" in texts
    across = [
        float(path.get("transform", "")[10:].split()[0]) for path in root.iter(f"{SVG}path") if path.get("transform")
    ]
    assert across == sorted(across, reverse=True) and len(across) == 9


def test_a_place_without_pictures_is_not_among_them(tmp_path: Path) -> None:
    page = build(rows(tmp_path, raw(policy="full", budget=None, task="alone"), raw(task="drawn"))).html
    assert page.count("<h3>alone") == 1 and page.count("<h3>drawn") == 2  # both have tables
    assert page.index("<h3>drawn") < page.index("<svg") < page.index("<h3>alone")
