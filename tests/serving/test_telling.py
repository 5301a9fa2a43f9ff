"""The text of an answer as it comes: the whole text in the end, whole letters on the way, nothing from a stop on."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.serving.calls import Calls
from attnpred.serving.telling import Teller
from tests.serving.test_turns import tokenizer

WORDS: Any = tokenizer(None)


def told(ids: list[int], stops: list[str], strips: bool = False) -> tuple[str, list[str], bool]:
    teller, parts = Teller(WORDS, stops, strips=strips), list[str]()
    for token in ids:
        parts.append(teller.add(token))
        if teller.is_stopped:
            return "".join(parts), parts, True
    return "".join(parts) + teller.finish(), parts, False


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.booleans())
def test_parts_make_the_text_up_to_its_first_stop(text: str, stops: list[str], strips: bool) -> None:
    ids = WORDS(text, add_special_tokens=False)["input_ids"]
    whole = WORDS.decode(ids, skip_special_tokens=True)
    whole = whole.lstrip() if strips else whole
    places = [place for place in (whole.find(stop) for stop in stops) if place >= 0]
    found, parts, is_stopped = told(ids, stops, strips)
    assert is_stopped == bool(places) and found == whole[: min(places, default=len(whole))]
    assert not any(part.endswith("\ufffd") for part in parts if "\ufffd" not in whole)


def test_bytes_that_become_no_letter_are_told_in_the_end() -> None:
    half = WORDS("é", add_special_tokens=False)["input_ids"][:1] if len(WORDS("é")["input_ids"]) > 1 else []
    for ids in (half, half * 20):
        assert told(ids, [])[0] == WORDS.decode(ids)


CALL = '<tool_call>\n{"name": "look", "arguments": {"place": "<x>"}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("text", ["Well. ", "a < b "])
def test_calls_are_taken_out_of_the_text(size: int, text: str) -> None:
    calls, whole = Calls(), text + CALL + " and" + CALL + " then <tool_call> nothing"
    out = "".join(calls.add(whole[i : i + size]) for i in range(0, len(whole), size)) + calls.add("", is_last=True)
    assert out == text + " and then <tool_call> nothing"
    assert [call["function"] for call in calls.found] == [{"name": "look", "arguments": '{"place": "<x>"}'}] * 2
    assert len({call["id"] for call in calls.found}) == 2


def test_what_is_no_call_stays_text() -> None:
    for text in (
        "<tool_call>no JSON</tool_call>",
        '<tool_call>["look"]</tool_call>',
        '<tool_call>{"name": 3}</tool_call>',
    ):
        calls = Calls()
        assert calls.add(text) + calls.add("", is_last=True) == text and not calls.found
