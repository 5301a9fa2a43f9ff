"""The official client of OpenAI's, over a real socket, unchanged: what it asks is answered as it expects."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from attnpred.errors import StoreError
from attnpred.serving import engine
from attnpred.serving.service import Plan
from tests.serving.server import SMALL, Running, is_idle, serving
from tests.serving.server import STORY as SENTENCE

STORY = SENTENCE * 24
ASKED: Any = [{"role": "user", "content": STORY + "Who wound it?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(Plan("demo", settings=SMALL, folder=tmp_path_factory.mktemp("serve"), waiting=16)) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def post(server: Running, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


def test_models_tell_their_context(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo" and model.to_dict()["context_length"] == 8192
    assert client.models.retrieve("demo").id == "demo"


@pytest.mark.slow
def test_greedy_answers_are_those_of_stock_generate(client: openai.OpenAI, server: Running) -> None:
    """With the full cache, whole or streamed, first or reused."""
    prompt = server.service.prompts.chat(ASKED)
    out = server.service.model.generate(
        torch.tensor([prompt.ids]), max_new_tokens=12, do_sample=False, cache_implementation="dynamic"
    )
    wanted = server.service.tokenizer.decode(out[0, len(prompt.ids) :], skip_special_tokens=True)
    for is_again in (False, True):
        found = client.chat.completions.create(
            model="demo", messages=ASKED, max_tokens=12, temperature=0, extra_body={"policy": "full"}
        )
        assert found.choices[0].message.content == wanted and found.choices[0].finish_reason == "length"
        assert found.usage is not None and found.usage.prompt_tokens_details is not None
        assert found.usage.prompt_tokens == len(prompt.ids) and found.usage.completion_tokens == 12
        assert bool(found.usage.prompt_tokens_details.cached_tokens) == is_again
    stream = client.chat.completions.create(
        model="demo", messages=ASKED, max_tokens=12, temperature=0, stream=True, extra_body={"policy": "full"}
    )
    parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.delta.content or "" for part in parts) == wanted
    assert parts[0].delta.role == "assistant" and parts[-1].finish_reason == "length" and len(parts) > 5


def test_what_a_policy_reads_is_counted(client: openai.OpenAI) -> None:
    found: Any = client.chat.completions.create(
        model="demo", messages=ASKED, max_tokens=8, temperature=0, extra_body={"policy": "quest", "budget": 96}
    )
    assert found.attnpred["compression"] > 2 and found.attnpred["tokens_attended"] <= 96 + 16
    assert found.timings["cache_n"] + found.timings["prompt_n"] == found.usage.prompt_tokens


def test_several_answers_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        found = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Why?"}], n=3, seed=seed, temperature=1.0, max_tokens=6
        )
        return [choice.message.content for choice in found.choices]

    first = ask(1)
    assert ask(1) == first != ask(2) and len(set(first)) > 1


def test_stops_and_usage_of_a_stream(client: openai.OpenAI) -> None:
    free = client.completions.create(model="demo", prompt="The garden was", max_tokens=16, temperature=0)
    stop = free.choices[0].text[6:9]
    stream = client.completions.create(
        model="demo",
        prompt="The garden was",
        max_tokens=16,
        temperature=0,
        stop=[stop],
        stream=True,
        stream_options={"include_usage": True},
    )
    *parts, last = list(stream)
    text = "".join(part.choices[0].text for part in parts)
    assert text == free.choices[0].text.partition(stop)[0] and parts[-1].choices[0].finish_reason == "stop"
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens <= 16


def test_probabilities(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Why?"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    assert found.choices[0].logprobs is not None and found.choices[0].logprobs.content is not None
    for one in found.choices[0].logprobs.content:
        assert one.logprob == one.top_logprobs[0].logprob and len(one.top_logprobs) == 3
        assert bytes(one.bytes or []).decode() == one.token
    plain = client.completions.create(model="demo", prompt="The", max_tokens=4, temperature=0, logprobs=2)
    chances: Any = plain.choices[0].logprobs
    assert "".join(chances.tokens) == plain.choices[0].text and all(len(one) == 2 for one in chances.top_logprobs)


def test_responses_are_a_layer_over_chat(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Why?"}], max_tokens=6, temperature=0
    )
    whole = client.responses.create(model="demo", input="Why?", max_output_tokens=6, temperature=0)
    assert whole.output_text == chat.choices[0].message.content and whole.status == "incomplete"
    events = list(client.responses.create(model="demo", input="Why?", max_output_tokens=6, temperature=0, stream=True))
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == whole.output_text


@pytest.mark.slow
def test_many_clients_at_once_get_what_each_gets_alone(server: Running) -> None:
    asked = [STORY[: 400 * number] + "Why?" for number in range(1, 6)]

    async def ask(client: openai.AsyncOpenAI, text: str) -> str:
        parts = []
        stream = await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": text}], max_tokens=10, temperature=0, stream=True
        )
        async for chunk in stream:
            parts.append(chunk.choices[0].delta.content or "")
        return "".join(parts)

    async def together() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            alone = [await ask(client, text) for text in asked]
            return alone, await asyncio.gather(*(ask(client, text) for text in asked))

    alone, found = asyncio.run(together())
    assert alone == found


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown field": ({"temperatur": 0}, "temperatur"),
    "a penalty": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "a bias": ({"logit_bias": {"5": 1}}, "logit_bias"),
    "a format": ({"response_format": {"type": "json_object"}}, "response_format.type"),
    "a number as text": ({"max_tokens": "4"}, "max_tokens"),
    "too many answers": ({"n": 99}, "n"),
    "half of a letter as a field": ({"HALF": 1}, ""),
    "more than the context": ({"max_tokens": 9000}, "max_tokens"),
    "heat below what halves can": ({"temperature": 0.001}, "temperature"),
    "no such policy": ({"policy": "nothing"}, "policy"),
    "a policy that reads all at once": ({"policy": "h2o"}, "policy"),
    "a budget too small": ({"budget": 3}, "budget"),
    "tools without a template for them": (
        {"tools": [{"type": "function", "function": {"name": "look"}}]},
        "tools",
    ),
    "options of a stream that is none": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "alternatives without probabilities": ({"top_logprobs": 2}, "top_logprobs"),
    "half of a letter": ({"messages": [{"role": "user", "content": "HALF"}]}, "messages"),
    "no message": ({"messages": []}, "messages"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(server: Running, case: str) -> None:
    more, field = REFUSED[case]
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 2} | more)
    found = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=body.replace("HALF", "\\ud800"),
        headers={"content-type": "application/json"},
    )
    error = found.json()["error"]
    assert found.status_code == 400 and error["type"] == "invalid_request_error" and "\n" not in error["message"]
    assert (error["param"] or "").startswith(field), error


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model="demo", messages=ASKED, top_p=7)
    with pytest.raises(openai.NotFoundError, match="expected 'demo'"):
        client.chat.completions.create(model="other", messages=ASKED)


def test_tokens_and_templates(server: Running) -> None:
    ids = post(server, "/tokenize", content="The garden", with_pieces=True).json()["tokens"]
    assert "".join(one["piece"] for one in ids) == "The garden"
    text = post(server, "/apply-template", messages=[{"role": "user", "content": "Why?"}]).json()["prompt"]
    assert text == server.service.prompts.chat([{"role": "user", "content": "Why?"}]).text


def test_a_client_that_goes_frees_everything_at_once(server: Running) -> None:
    body = {"model": "demo", "messages": ASKED, "max_tokens": 4000, "temperature": 0}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}, timeout=60) as stream:
        next(stream.iter_lines())
    server.wait_until_idle(5)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
    server.wait_until_idle(5)


@pytest.mark.parametrize("error", [OSError("the disk is gone"), StoreError("got a broken disk, expected a whole one")])
def test_a_stream_whose_step_fails_ends_with_an_error(
    server: Running, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OSError too, which is no sign of a client that went."""
    monkeypatch.setattr(engine, "step", lambda model, rows: dict.fromkeys(rows, error))
    body = {"model": "demo", "prompt": "The", "max_tokens": 4, "stream": True}
    found = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    *_, last = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")]
    assert last["error"]["type"] == "server_error" and "[DONE]" not in found.text


def test_metrics_count(server: Running) -> None:
    def generated() -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return float(
            next(line for line in lines if line.startswith('attnpred_tokens_total{kind="generated"}')).split()[-1]
        )

    before = generated()
    post(server, "/v1/completions", model="demo", prompt="The", max_tokens=3, temperature=0)
    assert generated() == before + 3


@pytest.mark.slow
def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    plan = Plan("demo", settings=SMALL, streams=1, waiting=1)
    body = {"model": "demo", "prompt": "The", "max_tokens": 300, "temperature": 0}

    async def flood(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            asked = (client.post(f"{url}/v1/completions", json=body | {"max_tokens": 100}) for _ in range(8))
            return list(await asyncio.gather(*asked))

    with serving(plan) as server:
        found = asyncio.run(flood(server.url))
        server.wait_until_idle()
    refused = [one for one in found if one.status_code == 429]
    assert refused and len(refused) + sum(one.status_code == 200 for one in found) == len(found)
    assert all(int(one.headers["retry-after"]) >= 1 for one in refused)


@pytest.mark.slow
def test_what_can_never_fit_is_refused_in_one_line() -> None:
    with serving(Plan("demo", settings=SMALL, memory_limit=1 << 20)) as server:
        found = post(server, "/v1/completions", model="demo", prompt=STORY, max_tokens=2000)
        assert (
            found.status_code == 400 and "expected at most 1.00 MiB (memory_limit)" in found.json()["error"]["message"]
        )
        assert is_idle(server.service)


@pytest.mark.slow
def test_a_document_that_cannot_be_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that could be read before this start is listed, with what is against it now."""
    kind = {"content-type": "text/plain"}
    with serving(Plan("demo", settings=SMALL, folder=tmp_path, keep_limit=0)) as server:
        kept = httpx.post(f"{server.url}/v1/documents", content=STORY, headers=kind).json()
        server.wait_until_idle()
    with serving(Plan("demo", settings=SMALL, folder=tmp_path, keep_limit=0, memory_limit=1 << 16)) as server:
        found = httpx.post(f"{server.url}/v1/documents", content=STORY, headers=kind)
        assert found.status_code == 400 and "(memory_limit)" in found.json()["error"]["message"]
        (listed,) = httpx.get(f"{server.url}/v1/documents").raise_for_status().json()["data"]
        assert (listed["id"], listed["status"]) == (kept["id"], "failed") and "(memory_limit)" in listed["error"]
        assert len(list(tmp_path.rglob("doc-*.json"))) == 1
        monkeypatch.setattr(server.service.engine.admission, "limit", 1 << 30)
        assert httpx.get(f"{server.url}/v1/documents/{kept['id']}").json()["status"] in ("reading", "ready")
        server.wait_until_idle()
