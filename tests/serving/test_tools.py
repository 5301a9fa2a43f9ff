"""Tools go into the chat template and come back as calls; and what well-known clients send is taken as it is."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from attnpred.serving import answers
from attnpred.serving.drawing import Drawing, Drawn
from attnpred.serving.service import Plan
from tests.serving.server import SMALL, Running, serving, wait_for

TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }} Call them in <tool_call>.\n{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look a place up.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
SAID = 'Let me look. <tool_call>{"name": "look_up", "arguments": {"place": "Arica"}}</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(Plan("demo", settings=SMALL, logs_prompts=True), template=TEMPLATE) as found:
        yield found


@pytest.fixture
def scripted(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model say `SAID`."""
    words = server.service.tokenizer(SAID, add_special_tokens=False)["input_ids"]
    end = min(server.service.ends)

    class Script:
        def __init__(self, drawing: Drawing, row: int) -> None:
            self.left = [*words, end]

        def draw(self, logits: torch.Tensor) -> Drawn:
            return Drawn(self.left.pop(0), None, ())

    monkeypatch.setattr(answers, "Drawer", Script)


@pytest.mark.usefixtures("scripted")
def test_a_call_comes_back_whole_and_streamed(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    messages: Any = [{"role": "user", "content": "Where is Arica?"}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with caplog.at_level(logging.INFO, "attnpred.serve"):
            found = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS)
            wait_for(lambda: caplog.records)  # the line comes after the answer
        (choice,) = found.choices
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look. "
        (call,) = choice.message.tool_calls or []
        assert call.type == "function" and call.function.name == "look_up"
        assert json.loads(call.function.arguments) == {"place": "Arica"}
        stream = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS, stream=True)
        chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(one.delta.content or "" for one in chunks) == "Let me look. "
        calls = [call for one in chunks for call in one.delta.tool_calls or []]
        assert len(calls) == 1 and chunks[-1].finish_reason == "tool_calls"
        # the answer to the call goes back with the next request
        again = [
            *messages,
            {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "In Chile."},
        ]
        client.chat.completions.create(model="demo", messages=again, tools=TOOLS, tool_choice="none", max_tokens=2)
    assert "Look a place up." in caplog.text and "Where is Arica?" in caplog.text, "it was started to log prompts"


def test_another_choice_of_tools_is_refused_by_name(server: Running) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Why?"}], "tools": TOOLS}
    for choice in ("required", {"type": "function", "function": {"name": "look_up"}}):
        found = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"tool_choice": choice})
        assert found.status_code == 400 and found.json()["error"]["param"] == "tool_choice"


CLIENTS: dict[str, dict[str, Any]] = {
    "llm": {"stream": True, "stream_options": {"include_usage": True}},
    "llm --no-stream, with options": {"stream": False, "temperature": 0.7, "top_p": 0.9, "seed": 3, "max_tokens": 3},
    "Open WebUI": {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3, "frequency_penalty": 0},
    "Open WebUI, a title": {"stream": False, "max_completion_tokens": 3},
    "LibreChat": {"stream": True, "user": "someone", "presence_penalty": 0, "frequency_penalty": 0, "top_p": 1},
}


@pytest.mark.parametrize("name", CLIENTS)
def test_what_clients_send_is_taken(server: Running, name: str) -> None:
    body = {"model": "demo", "max_tokens": 3, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}  # fmt: skip
    more = CLIENTS[name]
    if "max_completion_tokens" in more:
        del body["max_tokens"]
    found = httpx.post(
        f"{server.url}/v1/chat/completions", json=body | more, headers={"authorization": "Bearer x"}, timeout=60
    )
    assert found.status_code == 200, found.text
    kind = "text/event-stream" if more["stream"] else "application/json"
    assert found.headers["content-type"].startswith(kind)
