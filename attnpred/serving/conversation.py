"""`Conversation`: questions about a text, one after the other; the cache goes on from each answer.

What was said is a list of token ids, and the cache holds all of them but perhaps the last. Where it cannot go on (another
policy, a question that was broken off) it is given up, and made again from the ids: the text comes from its kept file, and
what was said since is read again. So there is one way into every state, and nothing is ever half in the cache.
"""

from dataclasses import replace
from types import TracebackType
from typing import Any, final

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.hf import TieredCache
from attnpred.policies.base import Policy
from attnpred.policies.full import Full
from attnpred.serving.answering import Answer, IsStopped, Sampling, Say, answer, never
from attnpred.serving.reader import Reader
from attnpred.serving.turns import turns_of

SPARE = 512
"""Tokens of a model's context that a document leaves for questions and answers."""


@final
class Conversation:
    """A document, which may be empty, and what was said about it; `with` closes its cache.

    The model must be attached as long as questions are asked. limit: tokens of its context. Raises `ConfigError` for a
    document that has no room in it.
    """

    def __init__(
        self, reader: Reader, tokenizer: Any, document: str, policy: Policy[Any], settings: CacheConfig, limit: int
    ) -> None:
        self.reader, self.tokenizer, self.limit = reader, tokenizer, limit
        self.policy, self.settings = policy, policy.settle(settings)
        self.turns = turns_of(tokenizer)
        self.document = self._ids(self.turns.opening(document), self.turns.is_plain)
        if document and len(self.document) > limit - SPARE:
            raise ConfigError(
                f"got a document of {len(self.document)} tokens, expected at most {limit - SPARE} ({limit} of the model's "
                f"context, less {SPARE} for questions and answers): give a shorter one, or its beginning (--max-document-tokens)"
            )
        self._cache: TieredCache | None = None
        self.forget()

    def forget(self) -> None:
        """Begin again after the document."""
        self.ids, self.asked = list(self.document), 0
        self._between = ""
        """The text before the next question."""
        self.close()

    def switch(self, policy: Policy[Any], settings: CacheConfig) -> None:
        """Go on under another policy, or other settings."""
        self.policy, self.settings = policy, settings
        self.close()

    def open(self) -> TieredCache:
        """Return the cache, ready for a question. The text is read now, if it has to be."""
        if self._cache is None:
            self._cache = self.reader.read(self.document, self.policy, self.settings)
            self.reader.read_on(self._cache, self.ids)
        return self._cache

    def close(self) -> None:
        """Free the cache; what was said is known all the same."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def ask(self, question: str, sampling: Sampling, say: Say, is_stopped: IsStopped = never) -> Answer:
        """Answer a question. Raises `ConfigError` if the model's context has no room for it."""
        said = self.ids + self._ids(self._between + question + self.turns.answer)
        if len(said) >= self.limit:
            raise ConfigError(
                f"got {len(said)} tokens up to this question, expected fewer than the {self.limit} of the model's context: "
                "begin again after the document"
            )
        try:
            found = self._answer(self.open(), said, sampling, say, is_stopped)
        except BaseException:
            self.close()
            raise
        self.asked, self.ids = len(said), said + found.ids
        self._between = self.turns.question.removeprefix(found.closing)
        return found

    def ask_full(self, sampling: Sampling, say: Say, is_stopped: IsStopped = never) -> Answer:
        """Answer the last question again with the full cache. What was said stays as it is. Raises `ConfigError`."""
        if not self.asked:
            raise ConfigError("got no question so far, expected one to answer with the full cache: ask it first")
        said = self.ids[: self.asked]
        with self.reader.read(self.document, Full(), self.settings) as cache:
            return self._answer(cache, said, sampling, say, is_stopped)

    def _answer(
        self, cache: TieredCache, said: list[int], sampling: Sampling, say: Say, is_stopped: IsStopped
    ) -> Answer:
        room = min(sampling.new_tokens, self.limit - len(said))
        return answer(
            self.reader.model,
            self.tokenizer,
            cache,
            said,
            replace(sampling, new_tokens=room),
            ends=self._ends(),
            closing=self.turns.closing,
            say=say,
            is_stopped=is_stopped,
        )

    def _ends(self) -> list[int]:
        """Return the tokens that end an answer: those of the model, and what its template puts after one."""
        given = self.reader.model.generation_config.eos_token_id
        found = [*(given if isinstance(given, list) else [given]), self.tokenizer.eos_token_id]
        found += [i for i in self._ids(self.turns.question)[:1] if i in self.tokenizer.all_special_ids]
        return [int(i) for i in dict.fromkeys(found) if i is not None]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
