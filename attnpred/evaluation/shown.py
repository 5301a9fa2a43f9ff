"""What the picture of the demo shows: which blocks a policy read for one answer, and one head's attention beside it.

The true attention of the answer's steps comes from one dense call over the question and the answer, with a policy that only
remembers (`attnpred.capture`); the policy then writes the same answer, token by token, and its choices are noted.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpred import hf
from attnpred.capture import captured
from attnpred.config import CacheConfig
from attnpred.evaluation.columns import Given, ReadText
from attnpred.evaluation.session import PolicySession
from attnpred.policies.base import Policy, View
from attnpred.policies.select import zone_at


@dataclass(frozen=True, slots=True)
class Shown:
    """Steps of one answer are T, blocks N; `spans` says where each block stands in the text.

    share [N]: how many of all heads read a block, mean over the steps. layer, head: the one with most attention between
    sinks and recent window; its true attention and forecast (None if the policy makes none), fp32 [T, N], and what it read,
    bool [T, N].
    """

    spans: list[tuple[int, int]]
    share: Tensor
    heads: int
    layer: int
    head: int
    true: Tensor
    forecast: Tensor | None
    selected: Tensor


def look_at(
    model: Any, tokenizer: Any, text: ReadText, given: Given, policy: Policy[Any], settings: CacheConfig
) -> Shown:
    """Return what `policy` reads to write the answer `given`."""
    settings = policy.settle(settings)
    quiz, size = text.quiz, settings.block_size
    question = quiz.question_ids(tokenizer, given.fact)
    ids = torch.tensor([[*quiz.ids, *question, *given.ids[:-1]]], device=model.device, dtype=torch.int64)
    blocks = -(-len(quiz.ids) // size)
    true = captured(model, ids, len(given.ids), size, text=text.cache).rows[..., :blocks].float().cpu()
    layer, head = busiest_head(true, settings)
    watcher = _Watcher(settings, blocks, layer, head)
    with PolicySession(model, tokenizer, policy, settings) as session:
        held = session.go_on(text.cache, quiz.ids)
        session.read_on(held, question)
        watcher.forecast_next(held.cache)
        session.weigh(held, given.ids, watcher)
        held.cache.close()
    forecast = torch.stack(watcher.forecasts[: len(given.ids)])
    spans = [
        (quiz.spans[i][0], quiz.spans[min(i + size, len(quiz.spans)) - 1][1]) for i in range(0, len(quiz.ids), size)
    ]
    return Shown(
        spans,
        torch.stack(watcher.shares).mean(0),
        true.shape[0] * true.shape[1],
        layer,
        head,
        true[layer, head],
        None if policy.needs_query else forecast,
        torch.stack(watcher.selected),
    )


class _Watcher:
    """Notes at every step how many heads read each block, and what one head forecast and read."""

    def __init__(self, settings: CacheConfig, blocks: int, layer: int, head: int) -> None:
        self.settings, self.blocks, self.layer, self.head = settings, blocks, layer, head
        self.shares: list[Tensor] = []
        self.selected: list[Tensor] = []
        self.forecasts: list[Tensor] = []

    def __call__(self, cache: hf.TieredCache) -> None:
        """Note a step."""
        read = torch.stack([self._read(cache.decoders[index].attended) for index in sorted(cache.decoders)])
        self.shares.append(read.float().mean((0, 1)))
        self.selected.append(read[self.layer, self.head])
        self.forecast_next(cache)

    def _read(self, attended: Any) -> Tensor:
        """Return which blocks of the text each head read, bool [Hkv, N]: of a dense step all."""
        if attended is None:
            return torch.ones(1, self.blocks, dtype=torch.bool, device="cpu")
        selection = attended[1][0].cpu()
        found = torch.zeros(selection.shape[0], self.blocks + 1, dtype=torch.bool, device="cpu")
        return found.scatter_(
            1, selection.masked_fill((selection < 0) | (selection >= self.blocks), self.blocks), True
        )[:, : self.blocks]

    def forecast_next(self, cache: hf.TieredCache) -> None:
        """Note the scores for the step that comes."""
        decoder = cache.decoders[sorted(cache.decoders)[self.layer]]
        if decoder.policy.needs_query or decoder.memory.is_empty:
            return self.forecasts.append(torch.zeros(self.blocks, dtype=torch.float32, device="cpu"))
        view = View(decoder.memory, zone_at(self.settings, cache.get_seq_length() + 1), decoder.layer)
        scores = decoder.policy.score(view)
        self.forecasts.append(
            scores.expand(1, max(scores.shape[1], self.head + 1), -1)[0, self.head, : self.blocks].float().cpu()
        )


def busiest_head(true: Tensor, settings: CacheConfig) -> tuple[int, int]:
    """Return layer and head with the most attention between sinks and recent window: `true` [layers, Hkv, T, N]."""
    first, last = settings.num_sink_tokens // settings.block_size, settings.recent_window // settings.block_size + 1
    mass = true[..., first : true.shape[3] - last - 16].sum((2, 3))
    mass[[layer for layer in range(len(mass)) if settings.is_dense_layer(layer)]] = -1.0
    return int(mass.argmax()) // true.shape[1], int(mass.argmax()) % true.shape[1]
