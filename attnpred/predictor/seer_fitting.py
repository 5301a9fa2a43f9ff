"""How a SeerAttention-R gate (`attnpred.predictor.seer_gate`) learns one layer from captured queries and keys.

The target of a query is its true attention, the largest probability inside each block and over the query heads of a group
(the rows of a trace), normalised to sum to one; the loss is the Kullback-Leibler divergence of the gate from it (arXiv
2410.13276, section 3.2; arXiv 2506.08889, section 2.2). Target and gate are taken over the blocks that a selection has to
choose: sinks and recent window are attended anyway, and with them in it a target would be about little else.

Adam from random projections, scaled so that the first gate vectors have unit variance.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpred.predictor.edges import Edges
from attnpred.predictor.seer_gate import GateMap

LOG_EVERY = 200
"""Steps that a line of the log is about."""


@dataclass(frozen=True, slots=True)
class GateSample:
    """One document of one layer, its whole blocks: queries [Hkv, T, G * D], pooled keys [Hkv, N, 3 * D], rows [Hkv, T, N].

    positions [T]: of the queries. mass [Hkv, T, N]: true attention, the sum over the group; only where it is to be measured.
    """

    queries: Tensor
    keys: Tensor
    rows: Tensor
    positions: Tensor
    mass: Tensor | None = None


def gate_loss(gate: GateMap, sample: GateSample, picks: Tensor, edges: Edges) -> Tensor:
    """Return the mean divergence, in nats, over the queries `picks` [M] and all heads."""
    blocks = sample.keys.shape[1]
    scored = edges.scored(sample.positions[picks], blocks)
    logits = gate.logits(sample.queries[:, picks], sample.keys @ gate.keys)
    shares = torch.log_softmax(logits.masked_fill(~scored, -1e4), -1)
    target = sample.rows[:, picks].float() * scored
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-9)
    return (torch.xlogy(target, target) - target * shares).sum(-1).mean()


def train_gate(
    samples: Sequence[GateSample],
    edges: Edges,
    seed: str,
    *,
    rank: int,
    steps: int,
    queries: int,
    lr: float,
    done: Callable[[], object] = lambda: None,
) -> tuple[GateMap, list[float]]:
    """Return projections to `rank` numbers, and the mean loss of every `LOG_EVERY` steps of `queries` queries.

    done: is told after each step.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(random.Random(f"{seed}/start").getrandbits(48))
    weights = [
        _start([getattr(sample, name) for sample in samples], rank, generator).requires_grad_()
        for name in ("queries", "keys")
    ]
    optimizer, log = torch.optim.Adam(weights, lr), [0.0] * -(-steps // LOG_EVERY)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        sample = rng.choice(samples)
        known = len(sample.positions)
        picks = torch.tensor(rng.sample(range(known), min(queries, known)), dtype=torch.int64, device="cpu")
        loss = gate_loss(GateMap(*weights), sample, picks, edges)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        place = step // LOG_EVERY
        log[place] += float(loss.detach()) / min(LOG_EVERY, steps - place * LOG_EVERY)
        done()
    return GateMap(*(weight.detach() for weight in weights)), log


def _start(vectors: Sequence[Tensor], rank: int, generator: torch.Generator) -> Tensor:
    """Return random projections [Hkv, W, r] that give `vectors` [Hkv, any, W] products of unit variance."""
    square = torch.stack([part.square().mean((1, 2)) for part in vectors]).mean(0)
    heads, _, width = vectors[0].shape
    start = torch.randn(heads, width, rank, generator=generator, dtype=torch.float32, device="cpu")
    return start / (square * width).sqrt().clamp_min(1e-6)[:, None, None]


@torch.no_grad()
def measured(gate: GateMap, sample: GateSample, edges: Edges, budgets: Sequence[float]) -> Tensor:
    """Return [2, budgets], of every 8th query and all heads: attention in the chosen blocks, and in the best ones."""
    assert sample.mass is not None
    every = torch.arange(0, len(sample.positions), 8, device="cpu")
    blocks = sample.keys.shape[1]
    scored = edges.scored(sample.positions[every], blocks)
    logits = gate.logits(sample.queries[:, every], sample.keys @ gate.keys).masked_fill(~scored, -1e9)
    mass = sample.mass[:, every] * scored
    found = torch.zeros(2, len(budgets), dtype=torch.float32, device="cpu")
    for i, budget in enumerate(budgets):
        count = max(1, int(budget * blocks) - edges.sinks - edges.recent - 1)
        found[0, i] = mass.gather(-1, logits.topk(count, -1).indices).sum()
        found[1, i] = mass.topk(count, -1).values.sum()
    return found
