"""`Job`: one request as the engine sees it, tokens in and events out; and the errors that a request ends in.

The engine runs in a thread of its own, and calls `tell` there; whoever waits for the events brings them to his own thread.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from attnpred.config import CacheConfig
from attnpred.errors import AttnpredError, ConfigError
from attnpred.policies.base import Policy
from attnpred.serving.drawing import Drawing, Drawn
from attnpred.serving.looking import Look
from attnpred.serving.telling import Teller


class FieldError(ConfigError):
    """A field of what was asked is wrong; `field` is its name."""

    def __init__(self, field: str, error: object) -> None:
        super().__init__(str(error))
        self.field = field


class BusyError(AttnpredError):
    """The queue is full. retry_after: seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"got a request more than the queue holds, expected fewer: ask again in {retry_after} s")
        self.retry_after = retry_after


class StoppingError(AttnpredError):
    """The engine has been told to stop, or has not begun."""


class TooLateError(AttnpredError):
    """The time that a request may take is over."""


@final
@dataclass(frozen=True, slots=True)
class Read:
    """So many tokens of the prompt have been read, `reused` of them at another time."""

    done: int
    total: int
    reused: int


@final
@dataclass(frozen=True, slots=True)
class Said:
    """Answer `row` goes on: text, and all tokens since the last time; looks: what each token was read from, if wanted."""

    row: int
    text: str
    tokens: tuple[Drawn, ...]
    looks: tuple[Look | None, ...]


@final
@dataclass(frozen=True, slots=True)
class Ended:
    """Answer `row` has ended: by itself ("stop"), or because it may not be longer ("length"). stats: of its cache."""

    row: int
    reason: str
    stats: dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Done:
    """All answers have ended, or the document is read. Milliseconds and tokens."""

    prompt: int
    reused: int
    new: int
    prompt_ms: float
    new_ms: float
    waited_ms: float


@final
@dataclass(frozen=True, slots=True)
class Failed:
    """The request came to nothing."""

    error: Exception


Event = Read | Said | Ended | Done | Failed
LAST = (Done, Failed)
"""Nothing comes after these."""


@final
@dataclass(eq=False)
class Job:
    """What is asked, and how far it is. owner: whose texts it may reuse. policy: None for a document that is only read.

    tellers: one for each answer. most: tokens of an answer. ends: tokens that end one. looks: whether steps are looked at.
    common: tokens up to the end of documents, where there are any.
    deadline: in the seconds of `time.monotonic`.
    """

    ids: Sequence[int]
    owner: str
    policy: Policy[Any] | None
    settings: CacheConfig
    tell: Callable[[Event], None]
    tellers: list[Teller] = field(default_factory=list)
    drawing: Drawing = field(default_factory=Drawing)
    most: int = 0
    ends: frozenset[int] = frozenset()
    looks: bool = False
    common: int = 0
    deadline: float = float("inf")
    is_cancelled: bool = False
    asked: float = field(default_factory=time.monotonic)
    bytes: int = 0
    """What it was admitted for."""

    @property
    def is_document(self) -> bool:
        """Whether nobody waits for an answer."""
        return self.policy is None
