"""A model with one policy and budget: documents are read, questions asked, and everything that is read is counted.

Every token of an answer, the first one too, comes from a decode step of one token: a question is read in one call but for
its last token, with which stock `generate` begins. So what is counted and timed are decode steps and nothing else, and a
policy that keeps everything cannot take its first token from a dense call. The last token of a document waits in the same
way for what follows it.

Costs are sums over all caches of the session, fast and slow bytes those of the largest cache. Time is the median over
the tokens of all answers.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor

from attnpred import hf
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.evaluation.tasks.base import Question
from attnpred.hf.reading import Reading
from attnpred.policies.base import Policy
from attnpred.telemetry import SUMMED, LayerCounts, total

Say = Callable[[int], None]
Watch = Callable[[hf.TieredCache], None]


def quietly(token: int) -> None:
    """Say nothing."""


def unwatched(cache: hf.TieredCache) -> None:
    """Look at nothing."""


@dataclass(slots=True)
class Held:
    """A cache and the ids of all it was given; the last of them waits outside, to be the first of the next call.

    After `follow` nothing waits: what comes next must have tokens of its own.
    """

    cache: hf.TieredCache
    ids: list[int]


@final
class Readings:
    """Texts that were read, for the sessions of other policies: the newest of at most `limit` bytes of tensors."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[tuple[int, ...], Reading] = {}

    def of(self, tokens: Sequence[int]) -> Reading | None:
        """Return the reading of these very tokens, if it is still kept."""
        return self._kept.get(tuple(tokens))

    def new(self, tokens: Sequence[int], device: torch.device) -> Reading:
        """Return an empty reading, to be filled now; the oldest make room for it."""
        while self._kept and sum(one.bytes() for one in self._kept.values()) > self.limit:
            del self._kept[next(iter(self._kept))]
        made = self._kept[tuple(tokens)] = Reading(torch.tensor([list(tokens[:-1])], device=device, dtype=torch.int64))
        return made


@final
class PolicySession:
    """A model attached to one policy as long as the `with` block lasts; see `attnpred.evaluation.tasks.base.Session`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        policy: Policy[Any],
        settings: CacheConfig,
        readings: Readings | None = None,
    ) -> None:
        self.model, self.tokenizer, self.policy, self.settings = model, tokenizer, policy, settings
        self._readings = readings
        self._counts, self._layers = LayerCounts(), 1
        self._fast, self._slow = 0, 0
        self._times: list[float] = []
        self._reading: list[float] = []

    def __enter__(self) -> "PolicySession":
        self._attached = hf.attach(self.model, policy=self.policy, config=self.settings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attached.detach()

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Held:
        """Return a cache of the document, read in one call but for its last token. Raises `ConfigError` if it has none."""
        if len(tokens) < 2:
            raise ConfigError(f"got a document of {len(tokens)} tokens, expected at least 2")
        held = Held(self._attached.new_cache(), list(tokens))
        if self._readings is not None and held.cache.sharing is None:
            known = self._readings.of(tokens)
            if known is not None:
                known.fill(held.cache)
                return held
            with self._readings.new(tokens, self.model.device).kept(held.cache):
                self._read(held)
            return held
        self._read(held)
        return held

    def _read(self, held: Held) -> None:
        start = time.perf_counter()
        self._feed(held.cache, held.ids[:-1])
        self._reading.append(time.perf_counter() - start)

    @torch.no_grad()
    def go_on(self, text: hf.TieredCache, tokens: Sequence[int]) -> Held:
        """Return a cache of the document `tokens`, whose beginning `text` holds (`hf.carry_over`).

        At least `CacheConfig.history` tokens, and the last one, have to be left to read.
        """
        held = Held(self._attached.new_cache(), list(tokens))
        hf.carry_over(text, held.cache)
        self._feed(held.cache, held.ids[text.get_seq_length() : -1])
        return held

    @torch.no_grad()
    def read_on(self, held: Held, tokens: Sequence[int]) -> None:
        """Add `tokens`; all but the last, and what has waited, are read in one call."""
        held.ids += tokens
        waiting = held.ids[held.cache.get_seq_length() : -1]
        if waiting:
            self._feed(held.cache, waiting)

    def fork(self, cache: Held) -> Held:
        """Return a copy that goes on by itself."""
        return Held(cache.cache.fork(), list(cache.ids))

    @torch.no_grad()
    def ask(self, cache: Held, question: Question) -> str:
        """Return the text of at most `question.new_tokens` greedy tokens, fewer only after an end-of-text token."""
        return str(self.tokenizer.decode(self.generate(cache, question), skip_special_tokens=True))

    @torch.no_grad()
    def generate(self, held: Held, question: Question, say: Say = quietly) -> list[int]:
        """Return the ids of an answer; they stay in the cache, the last one waiting. `say` is told of each as it comes."""
        self.read_on(held, question.tokens)
        ids = torch.tensor([held.ids], device=self.model.device, dtype=torch.int64)
        before, clock = total(list(held.cache.counts.values())), _Clock(say)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache=held.cache,
            max_new_tokens=question.new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=_padding(self.tokenizer),
            streamer=clock,
        )
        self._times += clock.intervals()
        self._count(held.cache, before)
        answer: list[int] = out[0, len(held.ids) :].tolist()
        held.ids += answer
        return answer

    @torch.no_grad()
    def follow(self, cache: Held, tokens: Sequence[int]) -> Tensor:
        """Feed `tokens` [T] one by one; return the log-probabilities after each, fp32 [T, vocabulary] on the CPU."""
        self.read_on(cache, tokens[:1])
        found = self._steps(cache.cache, tokens, unwatched)
        cache.ids += tokens[1:]
        return found

    @torch.no_grad()
    def weigh(self, held: Held, answer: Sequence[int], watch: Watch = unwatched) -> Tensor:
        """Return the log-probabilities that each token of `answer` [T] comes from, fp32 [T, vocabulary] on the CPU.

        It is given word by word, as if the model had chosen it; `watch` is shown the cache after each step, untimed.
        """
        found = self._steps(held.cache, [held.ids[-1], *answer[:-1]], watch)
        held.ids += answer
        return found

    def _steps(self, cache: hf.TieredCache, tokens: Sequence[int], watch: Watch) -> Tensor:
        before = total(list(cache.counts.values()))
        found = []
        for token in tokens:
            start = time.perf_counter()
            logits = self._feed(cache, [token])
            found.append(torch.log_softmax(logits.float(), -1).cpu())
            self._times.append((time.perf_counter() - start) * 1e3)
            watch(cache)
        self._count(cache, before)
        return torch.stack(found)

    def costs(self) -> dict[str, Any]:
        """Return what was counted, by the names of a row; None where there was nothing to count."""
        counts = self._counts
        steps = counts.steps / self._layers
        read = counts.bytes_read + counts.calibration_bytes + counts.digest_bytes
        moved = counts.bytes_fetched + counts.bytes_streamed
        return {
            "fast_bytes": self._fast or None,
            "slow_bytes": self._slow,
            "bytes_per_step": read / steps if steps else None,
            "moved_bytes_per_step": moved / steps if steps else None,
            "compression": counts.full_bytes / read if read else None,
            "tokens_attended": counts.tokens_attended / counts.steps if counts.steps else None,
            "hit_rate": counts.hits / counts.selected if counts.selected else None,
            "ms_per_token": statistics.median(self._times) if self._times else None,
            "prefill_seconds": statistics.median(self._reading) if self._reading else None,
        }

    def recovery(self) -> dict[str, float]:
        """Return attention recovery and its ratio to the best selection (`measure_recovery`); 1 where all was dense."""
        counts = self._counts
        if not counts.measured:
            return {"recovery": 1.0, "recovery_ratio": 1.0}
        kept, best = float(counts.recovery) / counts.measured, float(counts.best) / counts.measured
        return {"recovery": kept, "recovery_ratio": kept / best}

    def _feed(self, cache: hf.TieredCache, tokens: Sequence[int]) -> Tensor:
        """Return the logits after the last of `tokens`, [vocabulary]."""
        ids = torch.tensor([list(tokens)], device=self.model.device, dtype=torch.int64)
        logits: Tensor = self.model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        return logits

    def _count(self, cache: hf.TieredCache, before: LayerCounts) -> None:
        """Add what `cache` has counted since `before`, and what it takes now."""
        after = total(list(cache.counts.values()))
        for name in SUMMED:
            grown = getattr(self._counts, name) + getattr(after, name) - getattr(before, name)
            setattr(self._counts, name, grown)
        self._layers = max(1, len(cache.decoders))
        self._fast = max(self._fast, cache.fast_bytes())
        if cache.backing is not None:
            self._slow = max(self._slow, sum(cache.backing.tier.used().values()))


class _Clock:
    """A streamer of `generate` that notes when each token was there, and tells it on; the first it gets is the prompt."""

    def __init__(self, say: Say) -> None:
        self.say, self.moments = say, list[float]()

    def put(self, value: Tensor) -> None:
        self.moments.append(time.perf_counter())
        if len(self.moments) > 1:
            self.say(int(value))

    def end(self) -> None:
        pass

    def intervals(self) -> list[float]:
        """Milliseconds of each token; the first moment is the prompt's."""
        return [(after - before) * 1e3 for before, after in zip(self.moments, self.moments[1:], strict=False)]


def _padding(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else int(found)
