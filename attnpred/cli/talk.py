"""The conversation of `attnpred chat`: questions are answered on stdout, all else is said on stderr.

In a terminal a mistake is told and the talk goes on, and Ctrl-C stops an answer; from a pipe either ends it.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

from attnpred.errors import AttnpredError, ConfigError

if TYPE_CHECKING:
    from attnpred.serving.answering import Answer, Sampling
    from attnpred.serving.conversation import Conversation

HELP = """/stats         what was read so far, and how fast the last answer came
/policy NAME   go on with another policy; without a name: which there are
/budget N      go on with another budget: tokens, or a share of the context up to 1
/full          the last question again, answered with the full cache, side by side
/new           forget the conversation, keep the document
/quit          leave (Ctrl-D as well); Ctrl-C stops an answer"""


@final
class Talk:
    """Answers lines; those that begin with a slash are commands."""

    def __init__(
        self,
        conversation: "Conversation",
        sampling: "Sampling",
        policy: str,
        predictor: str | None,
        *,
        is_typed: bool,
    ) -> None:
        self.conversation, self.sampling, self.is_typed = conversation, sampling, is_typed
        self.policy, self.predictor = policy, predictor
        self.last: Answer | None = None
        self.way = ""
        """How the last answer was made."""
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/stats": self._stats,
            "/policy": self._switch_policy,
            "/budget": self._switch_budget,
            "/full": self._full,
            "/new": self._new,
        }

    def run(self, lines: Iterable[str]) -> None:
        """Answer `lines` until /quit. Raises `AttnpredError`, unless they are typed."""
        if self.is_typed:
            self._say(f"{self._state()}; /help lists the commands")
        for line in lines:
            line = line.strip()
            if line == "/quit":
                return
            try:
                self._take(line)
            except AttnpredError as error:
                if not self.is_typed:
                    raise
                self._say(f"attnpred: {error}")
            except KeyboardInterrupt:
                if not self.is_typed:
                    raise
                self._say("stopped")

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, rest = line.partition(" ")
            if name not in self.commands:
                raise ConfigError(f"got {name}, expected a question, or one of {', '.join(self.commands)}, /quit")
            return self.commands[name](rest.strip())
        try:
            line.encode()
        except UnicodeEncodeError:
            raise ConfigError("got a question that is no UTF-8 text, expected one: check the encoding") from None
        with self._stoppable() as is_stopped:
            self.last = self.conversation.ask(line, self.sampling, _write, is_stopped)
        self.way = self._way()
        print(flush=True)
        if self.is_typed:
            self._say(f"[{_times(self.last)}]")

    @contextmanager
    def _stoppable(self) -> Iterator[Callable[[], bool]]:
        """Let the first Ctrl-C stop an answer after its next token, and a second one break it off."""
        stopped = threading.Event()
        if not self.is_typed:
            yield stopped.is_set
            return

        def stop(number: int, frame: Any) -> None:
            if stopped.is_set():
                raise KeyboardInterrupt
            stopped.set()

        earlier = signal.signal(signal.SIGINT, stop)
        try:
            yield stopped.is_set
        finally:
            signal.signal(signal.SIGINT, earlier)

    def _help(self, rest: str) -> None:
        self._say(HELP)

    def _stats(self, rest: str) -> None:
        self._say(self._state())
        if self.last is None:
            return self._say("no question so far")
        total = self.last.stats["total"]
        self._say(f"last answer, {self.way}: {_times(self.last)}")
        self._say(
            f"a step attended to {total['tokens_attended']:,.0f} of {total['context_tokens']:,.0f} tokens per layer and head, and "
            f"read {total['compression']:.1f} times less KV than a full one; fast memory held {self.last.stats['fast_bytes']:,} bytes"
        )

    def _switch_policy(self, name: str) -> None:
        from attnpred.hf import make_policy
        from attnpred.policies import POLICIES

        talk = self.conversation
        if not name:
            return self._say(f"{self._state()}; there are {', '.join(POLICIES)}")
        talk.switch(make_policy(name, self.predictor, talk.reader.model.config, talk.settings), talk.settings)
        self.policy = name
        self._reopen()

    def _switch_budget(self, text: str) -> None:
        from attnpred.cli.options import read

        talk = self.conversation
        talk.switch(talk.policy, replace(talk.settings, budget=read("budget", int | float, text)))
        self._reopen()

    def _reopen(self) -> None:
        self.conversation.open()
        self._say(self._state())

    def _new(self, rest: str) -> None:
        self.conversation.forget()
        self.last = None
        self._reopen()

    def _full(self, rest: str) -> None:
        with self._stoppable() as is_stopped:
            if not self.is_typed:
                self.conversation.ask_full(self.sampling, _write)
                print(flush=True)
                return
            from attnpred.cli.side_by_side import side_by_side

            earlier = self.last.text if self.last is not None else ""
            with side_by_side((self.way, "full cache"), earlier) as say:
                full = self.conversation.ask_full(self.sampling, say, is_stopped)
        self._say(f"[full cache: {_times(full)}]")

    def _state(self) -> str:
        return f"{len(self.conversation.ids):,} tokens, {self._way()}"

    def _way(self) -> str:
        return f"policy {self.policy}, budget {self.conversation.settings.budget}"

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _times(answer: "Answer") -> str:
    cut = "" if answer.is_whole else ", cut off"
    return f"{len(answer.ids)} tokens{cut}, the first after {answer.first_seconds:.2f} s, then {answer.ms_per_token:.0f} ms each"
