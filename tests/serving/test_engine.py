"""The engine without HTTP: turns, deadlines, cancellation, failures that stay alone, memory that is given back."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor

from attnpred.errors import StoreError
from attnpred.hf.layer import TieredLayer
from attnpred.serving.drawing import Drawing
from attnpred.serving.job import Done, Ended, Event, Failed, Job, Read, Said, StoppingError, TooLateError
from attnpred.serving.service import Plan, Service
from tests.serving.server import SMALL, STORY, is_idle, loaded, wait_for


@dataclass
class Asked:
    """A job, and what came of it."""

    service: Service
    job: Any = None
    events: "queue.Queue[Event]" = field(default_factory=queue.Queue)
    seen: list[Event] = field(default_factory=list)

    def next(self) -> Event:
        self.seen.append(self.events.get(timeout=60))
        return self.seen[-1]

    def finish(self) -> Event:
        while not isinstance(self.next(), Done | Failed):
            pass
        return self.seen[-1]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.seen if isinstance(event, Said))


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    found = loaded(Service(Plan("demo", settings=SMALL, streams=8)))
    yield found
    found.close()
    assert not any(thread.name.startswith("attnpred") for thread in threading.enumerate())


def ask(service: Service, words: int, most: int = 8, **more: Any) -> Asked:
    asked = Asked(service)
    prompt = service.prompts.chat([{"role": "user", "content": STORY * words + "Why?"}])
    deadline = more.pop("deadline", float("inf"))
    owner = more.pop("owner", "local")
    asked.job = service.job(prompt, owner, asked.events.put, drawing=Drawing(0.0), most=most, **more)
    asked.job.deadline = deadline
    service.engine.submit(asked.job)
    return asked


def wait_until_idle(service: Service) -> None:
    wait_for(lambda: is_idle(service))


@pytest.mark.slow
def test_an_answer_goes_on_while_a_long_prompt_is_read(service: Service) -> None:
    """At every block of the prompt, the answer has about as much time as the block took."""
    short = ask(service, 1, most=400)
    while not isinstance(short.next(), Said):
        pass
    long = ask(service, 90, most=1, owner="newer")
    assert isinstance(long.finish(), Done)
    between = sum(isinstance(event, Said) for event in list(short.events.queue))
    blocks = sum(isinstance(event, Read) for event in long.seen)
    assert blocks >= 8 and between >= blocks
    service.engine.cancel(short.job)
    wait_until_idle(service)


@pytest.mark.slow
def test_short_prompts_pass_a_long_one(service: Service) -> None:
    long, short = ask(service, 95, most=1, owner="new"), ask(service, 1, most=1)
    assert isinstance(short.finish(), Done)
    assert not any(isinstance(event, Done) for event in list(long.events.queue))
    long.finish()


def test_what_takes_too_long_ends_with_an_error(service: Service) -> None:
    asked = ask(service, 1, most=4000, deadline=time.monotonic() + 0.3)
    failed = asked.finish()
    assert isinstance(failed, Failed) and isinstance(failed.error, TooLateError)
    wait_until_idle(service)


@pytest.mark.slow
def test_what_is_cancelled_says_nothing_more(service: Service) -> None:
    for number in range(4):
        asked = ask(service, 20, most=2000)
        for _ in range(number * 2):
            asked.next()
        service.engine.cancel(asked.job)
        wait_until_idle(service)
        assert not any(isinstance(event, Done | Failed | Ended) for event in list(asked.events.queue))


@pytest.mark.parametrize("together", [False, True])
def test_a_row_that_fails_takes_nobody_along(service: Service, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step ends in the middle of the layers; the others are put back, and say what they say alone."""
    wanted = ask(service, 8, policy="quest")
    wanted.finish()
    doomed = ask(service, 9, most=50, policy="quest")
    others = [ask(service, 8, policy="quest") for _ in range(2 if together else 0)]
    broken = []

    def append(store: Any, keys: Tensor, values: Tensor) -> None:
        if store in broken:
            raise StoreError("got a broken disk, expected a whole one")
        stock(store, keys, values)

    from attnpred.store.pool import BlockPool

    stock = BlockPool.append
    monkeypatch.setattr(BlockPool, "append", append)
    while not isinstance(doomed.next(), Said):
        pass
    row = next(row for one in service.engine._writing for row in one.rows if row.job is doomed.job)
    layer = row.cache.layers[3]
    assert isinstance(layer, TieredLayer)
    broken.append(layer.store)
    failed = doomed.finish()
    assert isinstance(failed, Failed) and "broken disk" in str(failed.error)
    for other in others:
        assert isinstance(other.finish(), Done) and other.text == wanted.text
    wait_until_idle(service)


@pytest.mark.slow
def test_an_answer_does_not_depend_on_what_was_reused(service: Service) -> None:
    """Not in the last bit: the probabilities are the same."""
    found = []
    for owner in ("first", "second", "second"):
        asked = Asked(service)
        prompt = service.prompts.chat([{"role": "user", "content": STORY * 30 + "Why?"}])
        asked.job = service.job(prompt, owner, asked.events.put, drawing=Drawing(0.0, alternatives=5), most=6)
        service.engine.submit(asked.job)
        done = asked.finish()
        assert isinstance(done, Done)
        tokens = [token for event in asked.seen if isinstance(event, Said) for token in event.tokens]
        found.append((done.reused, tokens))
    assert [reused > 0 for reused, _ in found] == [False, False, True]
    assert found[0][1] == found[1][1] == found[2][1]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["predicted", "quest", "snapkv", "full"])
def test_questions_about_a_document_go_on_from_where_the_policy_has_read_it(service: Service, policy: str) -> None:
    """A fork of it says what one that has read all by itself says, to the last bit, and in any order."""

    def asked(owner: str, question: str) -> tuple[int, list[Any]]:
        one = Asked(service)
        prompt = service.prompts.chat([{"role": "user", "content": question}], {"doc": STORY * 25})
        assert 0 < prompt.common < len(prompt.ids)
        drawing = Drawing(0.0, alternatives=5)
        one.job = service.job(prompt, owner, one.events.put, drawing=drawing, most=6, policy=policy)
        service.engine.submit(one.job)
        done = one.finish()
        assert isinstance(done, Done)
        tokens = [token for event in one.seen if isinstance(event, Said) for token in event.tokens]
        return len(prompt.ids) - done.reused, tokens

    first, second = "Who wound it?", "Where did the old clock stand, and why was it never wrong?"
    alone = [asked(f"{policy} {question}", question) for question in (first, second)]
    together = [asked(policy, question) for question in (first, second, first)]
    assert [tokens for _, tokens in together] == [alone[0][1], alone[1][1], alone[0][1]]
    assert [unread < 60 for unread, _ in together] == [False, True, True]
    assert 0 < service.engine.seeds.held_bytes <= service.engine.seeds.limit


@pytest.mark.slow
def test_requests_wait_for_memory(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask(service, 1, most=200)
    monkeypatch.setattr(service.engine.admission, "limit", first.job.bytes + 1000)
    second = ask(service, 1, most=200)
    while not isinstance(first.next(), Said):
        pass
    assert service.engine.queued == 1 and second.events.empty()
    service.engine.cancel(first.job)
    assert isinstance(second.finish(), Done)


@pytest.mark.slow
def test_the_end_gives_answers_some_time() -> None:
    service = loaded(Service(Plan("demo", settings=SMALL)))
    short, long = ask(service, 1, most=5), ask(service, 1, most=8000)
    while not isinstance(long.next(), Said):
        pass
    service.engine.close(0.7)
    assert isinstance(short.finish(), Done) and isinstance(long.finish(), Failed)
    with pytest.raises(StoppingError):
        service.engine.submit(Job([1], "local", None, SMALL, print))
    service.close()
