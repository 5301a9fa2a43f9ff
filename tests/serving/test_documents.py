"""Texts that are handed in: kept for their owner, in limits; what is no text is refused; a prompt knows where they stand."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from attnpred.errors import ConfigError
from attnpred.serving.documents import Documents, MissingError
from attnpred.serving.extracting import text_of
from attnpred.serving.prompts import Prompts
from tests.serving.test_turns import CHATML, tokenizer


def test_they_are_there_after_a_restart_for_their_owner_alone(tmp_path: Path) -> None:
    shelf = Documents(tmp_path, 10, 1000)
    made = shelf.add("one", "../../name", "A text \u00e9\U0001f600.", 4)
    again = Documents(tmp_path, 10, 1000)
    assert again.list("one") == [made] and again.list("two") == [] and again.get("one", made.id) == made
    for owner, name in (("two", made.id), ("one", "doc-" + "0" * 24), ("one", f"../one/{made.id}"), ("one", "")):
        with pytest.raises(MissingError):
            again.get(owner, name)
    assert [path.name for path in tmp_path.rglob("*.json")] == [f"{made.id}.json"]
    again.delete("one", made.id)
    assert not list(tmp_path.rglob("*.json")) and Documents(tmp_path, 10, 1000).list("one") == []


def test_there_are_not_too_many(tmp_path: Path) -> None:
    shelf = Documents(tmp_path, 2, 100)
    shelf.add("one", "a", "x" * 40, 1)
    with pytest.raises(ConfigError, match="got 140 bytes of documents, expected at most 100"):
        shelf.add("one", "b", "x" * 100, 1)
    shelf.add("one", "b", "y", 1)
    with pytest.raises(ConfigError, match="got a document more than 2"):
        shelf.add("one", "c", "z", 1)
    shelf.add("two", "c", "z", 1)


def test_many_threads_see_all_of_them_at_once(tmp_path: Path) -> None:
    """After a restart too, while the folder is read for the first time; and together they keep to the limit."""
    shelf = Documents(tmp_path, 20, 1000)
    with ThreadPoolExecutor(8) as pool:
        added = [pool.submit(shelf.add, "one", "name", "text", 1) for _ in range(30)]
        assert sum(one.exception() is None for one in added) == len(shelf.list("one")) == 20
        again = Documents(tmp_path, 20, 1000)
        seen = list(pool.map(lambda _: len(again.list("one")), range(8)))
    assert seen == [20] * 8


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": 3}', "[" * 1000])
def test_a_file_of_somebody_else_s_is_no_document(tmp_path: Path, text: str) -> None:
    shelf = Documents(tmp_path, 10, 1000)
    made = shelf.add("one", "name", "text", 1)
    (tmp_path / "one" / f"doc-{'1' * 24}.json").write_text(text)
    stolen = json.loads((tmp_path / "one" / f"{made.id}.json").read_text()) | {"id": "doc-" + "2" * 24}
    (tmp_path / "one" / f"doc-{'3' * 24}.json").write_text(json.dumps(stolen))
    assert Documents(tmp_path, 10, 1000).list("one") == [made]


def pdf(*pages: str) -> bytes:
    """Return a PDF with a line on each page."""
    writer = pypdf.PdfWriter()
    font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"), NameObject("/BaseFont"): NameObject("/Helvetica")})  # fmt: skip
    for text in pages:
        page, content = writer.add_blank_page(300, 300), DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(content)
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_texts_are_taken_out() -> None:
    assert text_of(pdf("The first page.", "The second."), "application/pdf", 1000) == "The first page.\n\nThe second."
    assert text_of("\ufeff# Title\r\n\r\né".encode(), "text/markdown; charset=utf-8", 1000) == "# Title\n\né"
    assert text_of("Grüße".encode("utf-16"), "text/plain", 1000) == "Grüße"


REFUSED = {
    "a picture": (b"\x89PNG", "image/png", "got a document of type 'image/png'"),
    "bytes": (bytes(range(128, 256)), "text/plain", "no UTF-8"),
    "nothing": (b" \n", "text/plain", "without text"),
    "too long": (b"x" * 1001, "text/plain", "got a document of 1,001 letters"),
    "no PDF": (b"hello", "application/pdf", "cannot be read"),
    "half of a PDF": (pdf("The first page.")[:300], "application/pdf", "PDF"),
    "a PDF of pictures": (pdf(""), "application/pdf", "without text"),
    "a long PDF": (pdf("x" * 900, "x" * 900), "application/pdf", "more than 1,000 letters"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused(case: str) -> None:
    data, kind, why = REFUSED[case]
    with pytest.raises(ConfigError, match=why):
        text_of(data, kind, 1000)


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_prompt_knows_where_its_documents_stand(template: str | None) -> None:
    prompts, one, two = Prompts(tokenizer(template)), "The first text. \U0001f600 é", "Another text."
    found = prompts.chat([{"role": "user", "content": "Who?"}], {"a": one, "b": two})
    assert [(place.document, found.text[place.start :][: place.length]) for place in found.places] == [
        ("a", one),
        ("b", two),
    ]
    for number, (first, last) in enumerate(found.spans):
        place = found.letters(number, number + 1)
        if place is not None:
            name, left, right = place
            assert {"a": one, "b": two}[name][left:right] in found.text[first:last] or right - left < last - first
    letters = [found.letters(number, number + 1) for number in range(len(found.ids))]
    assert {one[0] for one in letters if one is not None} == {"a", "b"}
    assert found.letters(len(found.ids) + 5, len(found.ids) + 9) is None


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=60).filter(str.strip), st.text(max_size=20))
def test_the_beginning_with_a_document_is_that_of_every_question(text: str, question: str) -> None:
    """So what was read of it serves; but for its last tokens, which may run into what follows."""
    prompts = Prompts(tokenizer(CHATML))
    begun = prompts.document("a", text).ids
    whole = prompts.chat([{"role": "user", "content": question}], {"a": text}).ids
    assert whole[: max(0, len(begun) - 4)] == begun[: max(0, len(begun) - 4)]
