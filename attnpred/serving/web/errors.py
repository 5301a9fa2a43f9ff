"""Errors as OpenAI's clients expect them, one object with message, type, param and code; and which has which status."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from attnpred.errors import AttnpredError, ConfigError, OutputError, TierFullError
from attnpred.serving.documents import MissingError
from attnpred.serving.job import BusyError, StoppingError, TooLateError

STATUSES: dict[type[AttnpredError], int] = {
    BusyError: 429,
    StoppingError: 503,
    TooLateError: 504,
    MissingError: 404,
    TierFullError: 400,
    ConfigError: 400,
    OutputError: 507,
}
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


def error_body(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """Return the object of an error."""
    kind = TYPES.get(status, "server_error")
    message, field = _writable(message), None if field is None else _writable(field)
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}


def _writable(text: str) -> str:
    """Return a text that can be sent: names that clients give may hold halves of letters."""
    return text.encode(errors="backslashreplace").decode()


def status_of(error: Exception) -> int:
    """Return the status of an error: 500 for one that nobody has foreseen."""
    return next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 500)


def body_of(error: Exception) -> dict[str, Any]:
    """Return the object of an error; what nobody has foreseen is not told to clients."""
    status = status_of(error)
    words = str(error) if status != 500 else "got an error inside the server, expected none: its log says more"
    return error_body(status, words, getattr(error, "field", None))


def install(app: FastAPI) -> None:
    """Answer every error of `app` with such an object."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"][1:] if not str(part).startswith(("function-", "list[", "literal["))]
        field = ".".join(place) or None
        words = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
        return JSONResponse(error_body(400, f"{field or 'body'}: {words}", field), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, headers=error.headers)

    @app.exception_handler(AttnpredError)
    async def ours(request: Request, error: AttnpredError) -> JSONResponse:
        wait = getattr(error, "retry_after", 5 if isinstance(error, StoppingError) else None)
        headers = None if wait is None else {"retry-after": str(wait)}
        return JSONResponse(body_of(error), status_of(error), headers=headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(body_of(error), 500)
