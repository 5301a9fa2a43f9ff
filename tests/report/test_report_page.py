"""The page: complete, escaped, with names for everything a screen reader meets, and pictures before tables."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from attnpred.errors import ConfigError
from attnpred.report.attention import HeadAttention, attention_pictures, load_attention, save_attention
from attnpred.report.latency import read_bench
from attnpred.report.page import build
from attnpred.report.rows import Row, read_rows

DATA = Path(__file__).parent / "data" / "rows.jsonl"
VOID = {"meta", "link", "br"}
NASTY = "<script>alert(1)</script>\"'&"
BENCH = {
    "cpu": "a <cpu>",
    "rows": [
        {"shape": "1b", "dtype": "bfloat16", "context": c, "variant": v, "ms_per_token": ms * c**0.5, "spread": [1, 900]}
        for c in (4096, 16384) for v, ms in (("floor", 1), ("transformers", 4), ("dense", 2), ("predicted", 1.1))
    ],
}  # fmt: skip


class Page(HTMLParser):
    """Every element with its attributes, the text inside it, and whether elements were closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, str] = {}
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for tag, attributes in self.open:
            for key in (tag, f"#{attributes.get('id')}"):
                self.words[key] = self.words.get(key, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def raw(**other: Any) -> dict[str, Any]:
    row = {"model": "m", "policy": "ema", "budget": 0.25, "task": "t", "metric": "accuracy", "value": 0.5, "length": 64,
           "interval": [0.4, 0.6], "n": 20}  # fmt: skip
    return row | other


def rows(tmp_path: Path, *given: dict[str, Any]) -> list[Row]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return read_rows([path])


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text("a table\n" + json.dumps(BENCH) + "\n", encoding="utf-8")
    return path


def head(steps: int = 12, blocks: int = 9) -> HeadAttention:
    torch.manual_seed(0)
    true = torch.rand(steps, blocks)
    return HeadAttention("layer 1", true, torch.rand(steps, blocks), true > 0.5)


@pytest.fixture
def made(bench: Path) -> Any:
    return build(read_rows([DATA]), read_bench(bench), head(), "1.2")


def test_every_section_is_there(made: Any) -> None:
    page = Page(made.html)
    assert [a["id"] for a in page.all("h2")] == ["pictures", "needles", "latency", "attention", "tables", "every-row"]
    names = [picture.name for picture in made.pictures]
    assert len(set(names)) == len(names) == len(page.all("svg"))
    kinds = {re.split(r"\d", name)[0] for name in names}
    assert kinds == {"budget", "cost", "needle", "latency", "bench", "attention"}
    assert {name.partition("-")[2] for name in names if name.startswith("cost")} == {"ms_per_token", "bytes_per_step", "fast_bytes"}  # fmt: skip


def test_the_page_begins_with_pictures_and_a_sentence_under_each(made: Any) -> None:
    page = Page(made.html)
    order = [tag for tag, _ in page.found]
    assert order.index("svg") < order.index("table")
    first = made.html[made.html.index('id="pictures"') : made.html.index('id="needles"')]
    found = re.findall(r"<h3>(.*?)</h3>|<svg[^>]*aria-labelledby=\"([a-z]+)\d|<figcaption>(.*?)</figcaption>", first)
    kinds = ["heading" if heading else kind or "words" for heading, kind, _ in found]
    places = made.html.count("<h3>") // 2
    assert places > 2 and kinds[:5] == ["heading", "budget", "words", "cost", "words"]
    told = [words for *_, words in found if words]
    assert all(re.fullmatch(r"(Higher|Lower) is better[^<]*\.", words) for words in told)
    assert all(". " not in words for words in told)


def test_what_a_screen_reader_meets_has_a_name(made: Any) -> None:
    page = Page(made.html)
    ids = [a["id"] for _, a in page.found if "id" in a]
    assert len(set(ids)) == len(ids)
    for attributes in (a for _, a in page.found):
        for name in ((attributes.get("aria-labelledby") or "") + " " + (attributes.get("href") or " ")[1:]).split():
            if not name.startswith("ata:"):
                assert name in ids and page.words[f"#{name}"].strip()
    assert page.all("html")[0]["lang"] == "en" and page.words["title"]
    assert all(a["role"] == "img" and a["aria-labelledby"] for a in page.all("svg"))
    regions = [a for a in page.all("div") if "scroll" in (a.get("class") or "")]
    assert len(page.all("table")) == len(page.all("caption")) == len(regions) > 4
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-labelledby"] for a in regions)
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_nothing_comes_from_elsewhere(made: Any) -> None:
    page = Page(made.html)
    kept = made.html.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", kept)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert "default-src 'none'" in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", made.html, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert not any(name.startswith("on") or name == "style" for _, a in page.found for name in a)


def test_words_of_rows_are_never_markup(tmp_path: Path) -> None:
    nasty = dict.fromkeys(("model", "policy", "task", "metric", "text"), NASTY)
    items = [{"value": v, "labels": {"depth": v, NASTY: NASTY + str(v)}} for v in (0, 1)]
    given = rows(tmp_path, raw(**nasty, items=items, config={NASTY: NASTY}, commit=NASTY, ms_per_token=1), raw(**nasty | {"policy": "full"}, ms_per_token=2))  # fmt: skip
    made = build(given, None, HeadAttention(NASTY, *[torch.rand(3, 3)] * 2, torch.ones(3, 3) > 0))
    page = Page(made.html)
    assert len(page.all("script")) == 1 and "<script>alert" not in made.html
    assert "<script>alert(1)" in page.words["table"] and "<script>alert(1)" in page.words["pre"]


def test_the_page_is_the_same_for_the_same_rows(made: Any, bench: Path) -> None:
    assert build(read_rows([DATA]), read_bench(bench), head(), "1.2").html == made.html


def test_a_page_of_one_bare_row_is_whole(tmp_path: Path) -> None:
    bare = {"model": "m", "policy": "ema", "budget": 8, "task": "t", "metric": "accuracy", "value": 0.0}
    page = Page(build(rows(tmp_path, bare)).html)
    assert len(page.all("table")) == 4 and "no interval" in page.words["table"] and "attnpred bench decode" in page.words["main"]  # fmt: skip


def test_every_row_is_in_the_table_with_its_configuration(made: Any) -> None:
    found = read_rows([DATA])
    (table,) = re.findall(r'<table id="rows">(.*?)</table>', made.html, re.DOTALL)
    page = Page(table)
    assert len(page.all("details")) == len(found) == len(page.all("tr")) - 1
    for word in ("num_sink_tokens", "transformers", "commit: ", "seed: 0"):
        assert page.words["pre"].count(word) >= len(found)


def test_bytes_are_written_out(tmp_path: Path) -> None:
    page = build(rows(tmp_path, raw(bytes_per_step=20_973_760.0, ms_per_token=6.0742))).html
    assert "<td>20,973,760</td>" in page and "<td>6.074</td>" in page and "e+" not in page


def test_no_difference_stands_without_its_interval(made: Any) -> None:
    words = re.sub(r"\[[^\[\]]*\]", "@", Page(made.html).words["main"])
    after = re.findall(r"[+−]\d+\.\d+(..)", words)  # noqa: RUF001
    assert len(after) > 10 and set(after) == {" @"}


BENCHES: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "that is not JSON, expected the JSON object of `attnpred bench decode --json`"),
    "no rows": ("{}", "without 'rows'"),
    "a key is missing": ('{"rows": [{"shape": "1b"}]}', "rows[0] without 'dtype', expected the keys shape, dtype, context"),
    "time 0": (json.dumps({"rows": [BENCH["rows"][0] | {"ms_per_token": 0}]}), "rows[0] ms_per_token=0, expected a number above 0"),  # type: ignore[operator]
}  # fmt: skip


@pytest.mark.parametrize("mistake", BENCHES)
def test_a_wrong_bench_file_is_named(mistake: str, tmp_path: Path) -> None:
    text, message = BENCHES[mistake]
    (tmp_path / "b.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_bench(tmp_path / "b.json")
    assert str(caught.value).startswith(f"got {tmp_path / 'b.json'} ") and message in str(caught.value)


def test_attention_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_attention(head(), path)
    back = load_attention(path)
    assert back.title == "layer 1" and torch.equal(back.true, head().true)
    assert torch.equal(back.predicted, head().predicted) and torch.equal(back.selected, head().selected)
    assert list(tmp_path.iterdir()) == [path]


def test_the_pictures_say_how_often_the_strongest_block_was_attended() -> None:
    true = torch.eye(4)
    selected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]).bool()
    made = attention_pictures(HeadAttention("x", true, true, selected))
    assert len(made) == 3 and "In 75.0% of the 4 steps" in made[2].words
    assert len(attention_pictures(head(700, 2))) == 3


def test_wrong_attention_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ConfigError, match="expected a safetensors file that `attnpred demo --attention` wrote"):
        load_attention(path)
    path.write_bytes(b"no")
    with pytest.raises(ConfigError, match="expected a safetensors file"):
        load_attention(path)
    save_attention(HeadAttention("x", torch.rand(2, 3), torch.rand(3, 2), torch.rand(2, 3) > 0), path)
    with pytest.raises(ConfigError, match=r"expected one shape \[steps, blocks\]"):
        load_attention(path)
