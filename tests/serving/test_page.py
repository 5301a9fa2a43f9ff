"""The page in a headless Chromium: open, hand in a text, ask, watch, click, reload, delete; on a desk and on a phone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from attnpred.serving.service import Plan
from tests.report.browser import CHROMIUM, Browser
from tests.serving.server import SMALL, Running, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
]
TEXT = "\n".join(
    f"The \u00fcncle in house {number} \U0001f3e0 kept {number * 7} clocks, and wound them all on Sunday morning."
    for number in range(60)
)
READY = "document.documentElement.dataset.ready === 'yes'"
DONE = "document.querySelectorAll('.word').length > 0 && document.querySelectorAll('.writing').length === 0"
GLOWING = "[...CSS.highlights.values()].reduce((n, one) => n + one.size, 0)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(Plan("demo", settings=SMALL, folder=tmp_path_factory.mktemp("serve"))) as found:
        yield found


def ask(browser: Browser, question: str) -> None:
    browser.ask("document.getElementById('question').focus()")
    browser.write(question)
    browser.press("Enter")


def test_from_a_text_to_the_words_that_came_from_it(browser: Browser, server: Running, tmp_path: Path) -> None:
    path = tmp_path / "clocks.txt"
    path.write_text(TEXT, encoding="utf-8")
    browser.visit(server.url, 1280, False)
    browser.wait_for(READY)
    assert browser.ask("document.getElementById('text').hidden")
    browser.choose_file("#file", path)
    browser.wait_for("document.querySelector('#shelf .open .name')?.textContent === 'clocks.txt'")
    assert browser.ask("document.querySelectorAll('#text p').length") == 60
    browser.wait_for("document.getElementById('reading').hidden")
    browser.ask("document.getElementById('compare').click()")
    ask(browser, "How many clocks were in house 7?")
    browser.wait_for(f"{GLOWING} > 0 && document.querySelectorAll('.writing').length > 0")
    browser.wait_for(DONE)
    titles = browser.ask("[...document.querySelectorAll('.answer h2')].map(one => one.textContent)")
    figures = browser.ask("[...document.querySelectorAll('.figures')].map(one => one.innerText)")
    assert titles == ["predicted, budget 128", "full cache"]
    assert "times less" in figures[0] and "times less" not in figures[1]
    assert all("tokens/s" in one and "read before" in one for one in figures)
    # a word shows what was read for it, and is left by Escape
    count = browser.ask("document.querySelector('.words').children.length")
    assert count > 5
    browser.ask("document.querySelectorAll('.answer .word')[4].click()")
    assert browser.ask("document.querySelectorAll('.chosen').length") == 1 and 0 < browser.ask(GLOWING) <= 24
    browser.ask("document.querySelector('.chosen').focus()")
    browser.press("ArrowRight")
    browser.press("Enter")
    assert (
        browser.ask(
            "[...document.querySelectorAll('.answer .word')].findIndex(one => one.classList.contains('chosen'))"
        )
        == 5
    )
    # a passage that was read for the word leads back to it
    browser.ask("window.box = [...CSS.highlights.get('glow5')].at(-1).getClientRects()[0]")
    x, y = browser.ask("[box.left + 4, box.top + box.height / 2]")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.wait_for("document.querySelectorAll('.answer .word')[5].classList.contains('from')")
    browser.press("Escape")
    assert browser.ask("document.querySelectorAll('.chosen').length") == 0
    # glowing words are whole words of the text
    shown = browser.ask("[...CSS.highlights.values()].flatMap(one => [...one].map(String))")
    assert all(word in TEXT.split() for passage in shown for word in passage.split()), shown
    # everything is from this server, and nothing complained
    assert browser.complaints() == [] and all(url.startswith(server.url) for url in browser.requests())
    # it is there after a reload, and gone when it is deleted
    browser.visit(server.url, 1280, True)
    browser.wait_for("document.querySelectorAll('#text p').length === 60")
    browser.ask("document.querySelector('#shelf .away').click()")
    browser.wait_for("!document.getElementById('empty').hidden && document.querySelectorAll('#shelf li').length === 0")
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_its_screen(browser: Browser, server: Running, width: int, dark: bool) -> None:
    browser.visit(server.url, width, dark)
    browser.wait_for(READY)
    assert browser.ask("document.documentElement.scrollWidth") == browser.ask("innerWidth") == width
    assert browser.ask("document.getElementById('send').getBoundingClientRect().bottom <= innerHeight")
    colour = "rgb(18, 20, 23)" if dark else "rgb(244, 242, 236)"
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == colour


def test_any_budget_may_be_asked_for_or_none(browser: Browser, server: Running) -> None:
    browser.visit(server.url, 1280, False)
    browser.wait_for(READY)
    assert browser.ask("[budget.value, budget.placeholder, budget.checkValidity()]") == ["", "128", True]
    assert browser.ask("(budget.value = '819', document.getElementById('ask').checkValidity())")


def test_a_stop_ends_an_answer_on_the_server_too(browser: Browser, server: Running) -> None:
    browser.visit(server.url, 1280, False)
    browser.wait_for(READY)
    ask(browser, "Tell me a long story.")
    browser.wait_for("document.querySelectorAll('.word').length > 2")
    browser.ask("document.getElementById('send').click()")
    browser.wait_for("document.querySelectorAll('.writing').length === 0")
    assert "stopped" in browser.ask("document.querySelector('.figures').innerText")
    server.wait_until_idle(5)


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: Browser, server: Running) -> None:
    browser.visit(server.url, 1280, False)
    browser.wait_for(READY)
    browser.ask("document.activeElement.blur()")
    met = set()
    for _ in range(12):
        browser.press("Tab")
        met.add(browser.ask("document.activeElement.id || document.activeElement.className"))
    assert {"skip", "add", "question", "compare", "budget", "new", "send"} <= met
