"""What clients may ask for, field by field. Whatever is not here, or has a value that cannot be done, is refused by name.

Some fields of OpenAI's are here for their usual value alone, because clients send it: to accept another one, and do nothing,
would be to ignore it. `policy`, `budget`, `documents` and `reads` are this server's own (`extra_body` of the client).
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from attnpred.checks import BYTES, COLDEST, TOKENS
from attnpred.serving.drawing import Drawing
from attnpred.serving.job import FieldError

MOST_ANSWERS = 8


def only(*values: Any) -> AfterValidator:
    """Accept these values alone."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise ValueError(f"this server can do {' or '.join(map(repr, values))} alone")
        return value

    return AfterValidator(check)


class Strict(BaseModel):
    """No unknown field, no number as text, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Annotated[bool, only(False)] = False


class Sampled(Strict):
    """What completions of both kinds have in common."""

    model: Annotated[str, Field(max_length=1000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stop: Annotated[str, Field(min_length=1, max_length=1000)] | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)
    ] | None = None  # fmt: skip
    seed: Annotated[int, Field(ge=0, le=BYTES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    frequency_penalty: Annotated[float, only(0)] | None = None
    presence_penalty: Annotated[float, only(0)] | None = None
    logit_bias: Annotated[dict[str, Any], only({})] | None = None
    policy: Annotated[str, Field(max_length=100)] | None = None
    budget: Annotated[int, Field(gt=0, le=TOKENS)] | Annotated[float, Field(gt=0, le=1)] | None = None
    reads: bool = False

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def check_stream(self) -> None:
        """Raise `FieldError` for options of a stream that is none."""
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "got stream_options without stream, expected stream=true")

    def drawing(self, alternatives: int | None) -> Drawing:
        """Return how tokens are drawn. Raises `FieldError`."""
        heat = 1.0 if self.temperature is None else self.temperature
        if 0 < heat < COLDEST:
            raise FieldError(
                "temperature", f"got temperature={heat}, expected 0 for the likeliest token, or {COLDEST} to 2"
            )
        return Drawing(heat, 1.0 if self.top_p is None else self.top_p, self.seed, alternatives)


class TextPart(Strict):
    """A part of a message that is text."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class FunctionCall(Strict):
    """A call in an earlier message."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an earlier message, with its id."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: Annotated[str, only("")] | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """Return what a chat template gets."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or [])
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            found["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        return found


class Function(Strict):
    """A function that the model may ask to be called."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool, only(False)] | None = None


class Tool(Strict):
    """A tool."""

    type: Literal["function"]
    function: Function


class ResponseFormat(Strict):
    """Text alone."""

    type: Annotated[str, only("text")]


class TemplateRequest(Strict):
    """POST /apply-template: what the prompt of a chat is made of."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    documents: Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=100)] = []

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that an answer may call."""
        return self.tools or []


class ChatRequest(Sampled, TemplateRequest):
    """POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tool_choice: Annotated[str, only("auto", "none")] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    store: Annotated[bool, only(False)] | None = None
    metadata: Annotated[dict[str, Any], only({})] | None = None
    modalities: Annotated[list[str], only(["text"])] | None = None
    service_tier: Annotated[str, only("auto", "default")] | None = None

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that an answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def most(self) -> int | None:
        """Tokens of an answer. Raises `FieldError`."""
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise FieldError("max_tokens", "got max_tokens and max_completion_tokens, expected one of them")
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens are told; None: no probabilities. Raises `FieldError`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "got top_logprobs without logprobs, expected logprobs=true")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Annotated[bool, only(False)] | None = None
    best_of: Annotated[int, only(1)] | None = None
    suffix: Annotated[str, only("")] | None = None


class ResponseRequest(Strict):
    """POST /v1/responses, as far as it is a layer over a chat."""

    model: Annotated[str, Field(max_length=1000)]
    input: str | Annotated[list["InputMessage"], Field(min_length=1, max_length=10_000)]
    instructions: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    store: Annotated[bool, only(False)] | None = None
    metadata: Annotated[dict[str, Any], only({})] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    truncation: Annotated[str, only("disabled")] | None = None
    parallel_tool_calls: bool | None = None
    policy: Annotated[str, Field(max_length=100)] | None = None
    budget: Annotated[int, Field(gt=0, le=TOKENS)] | Annotated[float, Field(gt=0, le=1)] | None = None
    documents: Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=100)] = []


class InputMessage(Strict):
    """A message of `ResponseRequest`."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class TokenizeRequest(Strict):
    """POST /tokenize."""

    content: str
    add_special: bool = False
    with_pieces: bool = False
