"""What the endpoints may answer beside success, for the description of the interface (OpenAPI)."""

from typing import Any

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def refusal(words: str) -> dict[str, Any]:
    """Return the description of an error."""
    return {"description": words, "content": {"application/json": {"schema": ERROR}}}


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: refusal("What is asked for cannot be done; the field is named."),
    401: refusal("A key is needed."),
    403: refusal("Another host or origin than this server's."),
    404: refusal("No such model or document."),
    413: refusal("The body is too long."),
    429: refusal("The queue is full; Retry-After says when to come back."),
    503: refusal("The model is being loaded, or the server stops."),
    504: refusal("The request took longer than it may."),
}
OBJECT = {"application/json": {"schema": {"type": "object"}}}
ANSWERS: dict[int | str, dict[str, Any]] = REFUSALS | {
    200: {
        "description": "The answer; with stream=true as server-sent events.",
        "content": OBJECT | {"text/event-stream": {"schema": {"type": "object"}}},
    }
}
PLAIN: dict[int | str, dict[str, Any]] = REFUSALS | {200: {"description": "The answer.", "content": OBJECT}}
