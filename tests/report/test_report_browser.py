"""The page in a headless Chromium: nothing to complain of, no request, no scrolling sideways, in light and in dark."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnpred.report.latency import Bench
from attnpred.report.look import DARK, LIGHT
from attnpred.report.page import build
from attnpred.report.rows import read_rows
from tests.report.browser import CHROMIUM, Browser
from tests.report.test_report_page import head

DATA = Path(__file__).parent / "data" / "rows.jsonl"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(build(read_rows([DATA]), None, head()).html, encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_as_it_is_read(browser: Browser, page: Path, width: int, dark: bool, tmp_path: Path) -> None:
    browser.open(page, width, dark)
    browser.ask("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert browser.ask("document.documentElement.scrollWidth") == browser.ask("innerWidth") == width
    palette = DARK if dark else LIGHT
    wanted = "rgb({}, {}, {})".format(*(int(palette["page"][i : i + 2], 16) for i in (1, 3, 5)))
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == wanted
    sizes = json.loads(browser.ask("JSON.stringify([...document.querySelectorAll('svg')].map(one => [one.getBoundingClientRect().width, one.getBoundingClientRect().height]))"))  # fmt: skip
    assert sizes and all(min(250, width - 80) <= wide <= width and high > 50 for wide, high in sizes)
    # A chart's letters, as large as they are on the screen
    scale = min(wide for wide, _ in sizes) / 380
    assert 11 * scale >= 8.5
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert browser.complaints() == [] and browser.requests() == [page.resolve().as_uri()]


def test_words_stay_inside_their_charts(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, False)
    outside = browser.ask(
        "document.querySelectorAll('details').forEach(one => { one.open = true; });"
        "[...document.querySelectorAll('svg')].flatMap(svg => { const box = svg.getBoundingClientRect();"
        "return [...svg.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();"
        "return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1; })"
        ".map(t => t.textContent); })"
    )
    assert outside == []


def test_the_keyboard_reaches_what_scrolls_and_shows_where_it_is(browser: Browser, page: Path) -> None:
    browser.open(page, 360, False)
    met = []
    for _ in range(12):
        browser.press("Tab")
        met.append(
            browser.ask(
                "(() => { const at = document.activeElement; const style = getComputedStyle(at);"
                "return [at.className || at.tagName, style.outlineStyle, parseFloat(style.outlineWidth)]; })()"
            )
        )
    assert met[0][0] == "skip" and all(style == "solid" and width >= 2 for _, style, width in met)
    assert {"A", "SUMMARY"} <= {name for name, _, _ in met}
    assert browser.ask("[...document.querySelectorAll('.scroll')].every(one => one.tabIndex === 0)")
    assert browser.ask("(() => { const box = document.querySelector('.rows'); box.scrollLeft = 50; return box.scrollLeft; })()") == 50  # fmt: skip


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_begins_with_pictures(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width, False)
    top = "document.querySelector('{}').getBoundingClientRect().top"
    assert browser.ask(top.format("svg")) < 700 and browser.ask(top.format("table")) > browser.ask(
        top.format("#latency")
    )


@pytest.mark.parametrize("width", [360, 1280])
def test_names_stay_in_view_while_a_table_scrolls(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width, False)
    moved = browser.ask(
        "document.querySelectorAll('details').forEach(one => { one.open = true; });"
        "[...document.querySelectorAll('.scroll')].map(box => { box.scrollLeft = 99999; box.scrollTop = 99999;"
        "const left = box.getBoundingClientRect().left, names = [...box.querySelectorAll('tr > :first-child')];"
        "const seen = names.map(one => one.getBoundingClientRect());"
        "return [box.scrollLeft, Math.max(...seen.map(one => Math.abs(one.left - left))), Math.max(...seen.map(one => one.width))]; })"
    )
    assert len(moved) > 4 and any(scrolled > 100 for scrolled, _, _ in moved)
    assert all(aside <= 2 and wide <= width / 2 for _, aside, wide in moved)


def test_the_filter_shows_rows_with_the_words(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, False)
    shown = browser.ask(
        "(() => { const input = document.querySelector('input'); input.value = 'Predicted 2,048';"
        "input.dispatchEvent(new Event('input')); return document.querySelector('#rows').tBodies[0].innerText; })()"
    )
    rows = [row for row in read_rows([DATA]) if row.policy == "predicted" and row.length == 2048]
    assert len([line for line in shown.splitlines() if "predicted" in line]) == len(rows) > 0
    assert f"{len(rows)} of {len(read_rows([DATA]))} rows" in browser.ask("document.querySelector('[role=status]').textContent")  # fmt: skip


def test_what_the_page_does_not_hold_is_refused(browser: Browser, page: Path, tmp_path: Path) -> None:
    """The checks above can fail: a page with a script and a picture of somebody else's is told."""
    changed = tmp_path / "changed.html"
    extra = '<script>console.log(1)</script><img src="http://127.0.0.1:9/a.png"><p style="width:2000px">wide</p>'
    text = page.read_text(encoding="utf-8").replace("</main>", extra + "</main>")
    changed.write_text(text, encoding="utf-8")
    browser.open(changed, 360, False)
    assert len(browser.complaints()) >= 2
    open_page = tmp_path / "open.html"
    open_page.write_text('<img src="missing.png"><div style="width:2000px">wide</div>', encoding="utf-8")
    browser.open(open_page, 360, False)
    assert len(browser.requests()) == 2 and browser.ask("document.documentElement.scrollWidth") == 2000 + 8


def test_an_empty_bench_draws_nothing(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text(build(read_rows([DATA]), Bench((), "")).html, encoding="utf-8")
    browser.open(path, 1280, False)
    assert browser.complaints() == []
