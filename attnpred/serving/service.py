"""`Service`: a model that is loaded, its engine, and what belongs to them; from what a client asks to a job.

Loading takes a while, so it is a method of its own: until it is done `require_ready` refuses everything.
"""

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from attnpred.config import CacheConfig
from attnpred.errors import AttnpredError, ConfigError, PredictorError
from attnpred.folders import user_cache
from attnpred.hf import attach, is_carried, load_model, made_by, make_policy, make_settings
from attnpred.policies.base import Policy
from attnpred.serving.chain import BlockStore, chain
from attnpred.serving.documents import Document, Documents
from attnpred.serving.drawing import Drawing
from attnpred.serving.engine import Engine, Limits
from attnpred.serving.job import Done, Event, Failed, FieldError, Job, Read, StoppingError
from attnpred.serving.prompts import Prompt, Prompts
from attnpred.serving.telling import Teller
from attnpred.store.estimate import free_host_bytes


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """What is served, and how much of everything. Bytes, seconds, tokens.

    folder: of documents and blocks; None keeps them in memory alone. tokens: of an answer for which nobody says how many.
    """

    model: str
    policy: str = "predicted"
    predictor: str | None = None
    settings: CacheConfig = field(default_factory=CacheConfig)
    dtype: str = "auto"
    weights: str | None = None
    folder: Path | None = None
    keep_limit: int = 8 << 30
    block_memory: int = 1 << 30
    memory_limit: int | None = None
    streams: int = 64
    waiting: int = 64
    seconds: float = 600.0
    tokens: int = 1024
    documents: int = 100
    document_bytes: int = 1 << 26
    alias: str | None = None
    logs_prompts: bool = False

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.alias or self.model


@final
class Progress:
    """How far a document is read."""

    def __init__(self, total: int) -> None:
        self.done, self.total, self.status, self.error = 0, total, "reading", ""

    def tell(self, event: Event) -> None:
        """Take in what the engine says."""
        if isinstance(event, Read):
            self.done = event.done
        elif isinstance(event, Done):
            self.status = "ready"
        elif isinstance(event, Failed):
            self.status, self.error = "failed", str(event.error)


@final
class Service:
    """plan: what to serve. All but `load` and `close` may be called from any thread."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.created = plan, int(time.time())
        folder = plan.folder
        self.documents = Documents(
            None if folder is None else folder / "documents", plan.documents, plan.document_bytes
        )
        self._progress: dict[str, tuple[Progress, Job | None]] = {}
        self._lock = threading.Lock()
        self._attached = ExitStack()
        self._policies: dict[tuple[str, Any], tuple[Policy[Any], CacheConfig]] = {}
        self.is_ready = False
        self.watch: Callable[[Event, float], None] = _nobody
        """Is told every event, and the seconds since its request came."""

    @staticmethod
    def usual_folder() -> Path | None:
        """Return the folder in the user's cache; None for a user who has none."""
        cache = user_cache()
        return None if cache is None else cache / "serve"

    def load(self) -> None:
        """Load the model and begin to serve. Raises `AttnpredError`."""
        from attnpred.kernels.prepare import prepare

        plan = self.plan
        self.model, self.tokenizer = load_model(plan.model, dtype=plan.dtype)
        self.attached = attach(self.model, policy="full", weights=plan.weights)
        self._attached.callback(self.attached.detach)
        self.policy(None, None)  # what cannot be served is refused now
        self.prompts = Prompts(self.tokenizer)
        text = self.model.config.get_text_config()
        self.context = int(getattr(text, "max_position_embeddings", None) or sys.maxsize)
        self.ends = self._ends()
        folder = None if plan.folder is None else plan.folder / "blocks"
        store = BlockStore(folder, plan.keep_limit, plan.block_memory)
        memory = plan.memory_limit or max(1 << 30, (free_host_bytes() or 16 << 30) * 3 // 4 - 2 * plan.block_memory)
        self.engine = Engine(
            self.model, repr(made_by(self.model)), store, Limits(plan.streams, plan.waiting, memory, plan.block_memory)
        )
        prepare(self.model.device.type)
        self.engine.start()
        self.is_ready = True

    def close(self, patience: float = 0.0) -> None:
        """End: answers that are written get `patience` seconds more."""
        if self.is_ready:
            self.engine.close(patience)
        self._attached.close()

    def require_ready(self) -> None:
        """Raise `StoppingError` while the model is loaded."""
        if not self.is_ready:
            raise StoppingError(
                "got a request while the model is being loaded, expected it later: ask again in a moment"
            )

    def policy(self, name: str | None, budget: int | float | None) -> tuple[Policy[Any], CacheConfig]:
        """Return policy and settings of a request; None: those of the server. Raises `ConfigError`."""
        key = name or self.plan.policy, self.plan.settings.budget if budget is None else budget
        found = self._policies.get(key)
        if found is None:
            try:
                settings = make_settings(self.plan.settings, {"budget": key[1]})
            except ConfigError as error:
                raise FieldError("budget", error) from None
            try:
                policy = make_policy(key[0], self.plan.predictor if name is None else None, self.model.config, settings)
                settings = policy.settle(settings)
            except (ConfigError, PredictorError) as error:
                raise FieldError("policy", error) from None
            if settings.layer_groups is not None or not is_carried(policy, settings):
                raise FieldError(
                    "policy",
                    f"got policy {key[0]!r}, which has to read a whole prompt in one call, expected one that looks at the end of "
                    f"it, so that others get their turns: predicted, quest, ema, snapkv, full ...",
                )
            found = policy, settings
            if len(self._policies) < 256:
                self._policies[key] = found
        return found

    def job(
        self,
        prompt: Prompt,
        owner: str,
        tell: Callable[[Event], None],
        *,
        policy: str | None = None,
        budget: int | float | None = None,
        most: int | None = None,
        answers: int = 1,
        stops: Sequence[str] = (),
        strips: bool = False,
        drawing: Drawing,
        looks: bool = False,
        where: str = "messages",
    ) -> Job:
        """Return what the engine is to do. where: the field that the prompt came in. Raises `FieldError`."""
        chosen, settings = self.policy(policy, budget)
        room = self.context - len(prompt.ids)
        if room < 1 or not prompt.ids:
            wanted = f"at most {self.context - 1}" if prompt.ids else "at least one"
            raise FieldError(
                where, f"got a prompt of {len(prompt.ids)} tokens, expected {wanted}: the context is {self.context}"
            )
        if most is not None and most > room:
            raise FieldError(
                "max_tokens", f"got max_tokens={most}, expected at most {room}: the context is {self.context}"
            )
        began = time.monotonic()

        def watched(event: Event) -> None:
            self.watch(event, time.monotonic() - began)
            tell(event)

        return Job(
            ids=prompt.ids,
            owner=owner,
            policy=chosen,
            settings=settings,
            tell=watched,
            tellers=[Teller(self.tokenizer, stops, strips=strips) for _ in range(answers)],
            drawing=drawing,
            most=min(self.plan.tokens, room) if most is None else most,
            ends=self.ends,
            looks=looks and bool(prompt.places),
            common=prompt.common,
            deadline=time.monotonic() + self.plan.seconds,
        )

    def texts(self, owner: str, names: Sequence[str]) -> Mapping[str, str]:
        """Return texts by document id. Raises `MissingError`."""
        return {name: self.documents.get(owner, name).text for name in names}

    def add_document(self, owner: str, name: str, text: str) -> Document:
        """Keep a text, and have it read. Raises `AttnpredError`, and keeps nothing, where that cannot be done."""
        ids = self.prompts.document("", text).ids
        if (count := len(ids)) >= self.context:
            raise ConfigError(
                f"got a document of {count} tokens, expected fewer than the {self.context} of the context"
            )
        made = self.documents.add(owner, name, text, count)
        try:
            self._read(owner, made, ids)
        except AttnpredError:
            self.documents.delete(owner, made.id)
            raise
        return made

    def delete_document(self, owner: str, name: str) -> Document:
        """Forget a document; what is being read of it is let go. Raises `MissingError`."""
        found = self.documents.delete(owner, name)
        with self._lock:
            _, job = self._progress.pop(found.id, (None, None))
        if job is not None:
            self.engine.cancel(job)
        return found

    def progress(self, owner: str, document: Document) -> Progress:
        """Return how far a document is read; one that was handed in before this start is read if it has to be."""
        with self._lock:
            known = self._progress.get(document.id)
        if known is not None:
            return known[0]
        try:
            return self._read(owner, document, self.prompts.document(document.id, document.text).ids)
        except AttnpredError as error:  # of the queue, or of a smaller memory limit: it is tried again the next time
            progress = Progress(document.tokens)
            progress.tell(Failed(error))
            return progress

    def _read(self, owner: str, document: Document, ids: Sequence[int]) -> Progress:
        parts = chain(f"{self.engine.root} {owner}", ids)
        progress, job = Progress(parts[-1].stop if parts else 0), None
        if all(self.engine.store.has(part.name) for part in parts):
            progress.status, progress.done = "ready", progress.total
        else:
            job = Job(ids, owner, None, self.policy(None, None)[1], progress.tell)
            self.engine.submit(job)
        with self._lock:
            self._progress[document.id] = progress, job
        return progress

    def _ends(self) -> frozenset[int]:
        """Return the tokens that end an answer: those of the model, and what its template puts after one."""
        given = self.model.generation_config.eos_token_id
        found = [*(given if isinstance(given, list) else [given]), self.tokenizer.eos_token_id]
        after = self.tokenizer(self.prompts.turns.question, add_special_tokens=False, verbose=False)["input_ids"][:1]
        found += [one for one in after if one in self.tokenizer.all_special_ids]
        return frozenset(int(one) for one in found if one is not None)


def _nobody(event: Event, since: float) -> None:
    """Count nothing."""


def owner_of(key: str | None) -> str:
    """Return the name under which what belongs to a key is kept; None: a server without keys has one owner."""
    return "local" if key is None else hashlib.sha256(f"attnpred owner {key}".encode()).hexdigest()[:32]
