"""Decode steps of a captured document without its keys: a policy's closed loop, as fast as a training run needs it.

The queries are those of the captured pass (teacher-forced tokens, dense attention); the history is the selection's own:
each step chooses with the weights, attends to what it chose (`BlockTruth` has all that this needs), and remembers that
alone. Several budgets run side by side as the batch, the heads of all layers as the heads. The state is the real one
(`Stream`), so what is learned here is what decoding sees; a test holds the two against each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpred.kernels.digest import FLOOR
from attnpred.predictor.block_truth import BlockTruth
from attnpred.predictor.digest import Digest, DigestMap
from attnpred.predictor.digest_training import Edges
from attnpred.predictor.streaming import Stream
from attnpred.predictor.traces import Vectors


@dataclass(frozen=True, slots=True)
class Step:
    """One step: features [budgets, R, C, F] of the blocks to choose from, and their attention, mass [R, C]."""

    features: Tensor
    mass: Tensor


@torch.no_grad()
def estimates(document: Vectors, maps: Sequence[DigestMap | None], edges: Edges) -> Tensor:
    """Return what the digests say for every query, [T, R, N]; the floor where a block was not sealed yet."""
    layers, _, steps, _ = document.queries.shape
    heads, length = document.keys.shape[1], document.keys.shape[2]
    blocks = length // edges.block_size
    sealed = [min(blocks, (document.first + step + 1) // edges.block_size) for step in range(steps)]
    found = []
    for layer in range(layers):
        digest = Digest(edges.block_size, maps[layer])
        digest.seal(document.keys[layer][None, :, : blocks * edges.block_size].float())
        queries = document.queries[layer].float()
        rows = torch.full((steps, heads, blocks), FLOOR, dtype=torch.float32, device="cpu")
        for step, count in enumerate(sealed):
            rows[step, :, :count] = digest.shares(queries[None, :, step], edges.scale, heads, count)[0]
        found.append(rows)
    return torch.cat(found, 1)


@torch.no_grad()
def replay(
    truth: BlockTruth,
    estimate: Tensor,
    edges: Edges,
    weights: Tensor,
    budgets: Sequence[float],
    prompt_rows: int,
    *,
    correcting: bool,
) -> Iterator[Step]:
    """Yield the steps after the first `prompt_rows` queries, chosen with `weights` [R or 1, F].

    correcting: choose with the estimate for the step's own query, else with that for the query before.
    """
    heads, _, steps, blocks = truth.largest.shape
    stream = Stream(edges.block_size, None, prompt_rows)
    dense = torch.exp(truth.largest[:, :, :prompt_rows] - truth.total[:, :, :prompt_rows].logsumexp(-1, keepdim=True))
    stream.push(dense.amax(1)[None].expand(len(budgets), -1, -1, -1))
    for step in range(prompt_rows, steps):
        length = truth.first + step + 1
        first_recent = length // edges.block_size - edges.recent
        seen = -(-length // edges.block_size)
        sealed = length // edges.block_size
        stream.digest.estimate = estimate[step if correcting else step - 1][..., :sealed].expand(len(budgets), -1, -1)
        chosen = torch.zeros(len(budgets), heads, blocks, dtype=torch.bool, device="cpu")
        chosen[..., : edges.sinks] = chosen[..., first_recent:seen] = True
        if first_recent - edges.sinks > 0:
            yield Step(stream.features(edges.sinks, first_recent), truth.mass[:, step, edges.sinks : first_recent])
            scores = stream.score(weights, edges.sinks, first_recent, first_recent)[..., edges.sinks :]
            for i, budget in enumerate(budgets):
                free = int(budget * length) // edges.block_size - edges.sinks - edges.recent - 1
                best = scores[i].topk(min(max(1, free), scores.shape[-1]), -1).indices
                chosen[i].scatter_(1, best + edges.sinks, True)
        stream.digest.estimate = estimate[step][..., :sealed].expand(len(budgets), -1, -1)
        inside = truth.total[:, :, step].masked_fill(~chosen[:, :, None], -torch.inf)
        row = torch.exp(truth.largest[:, :, step] - inside.logsumexp(-1, keepdim=True)).amax(2) * chosen
        stream.push(row[:, :, None, :seen], chosen[:, :, None, :seen])
