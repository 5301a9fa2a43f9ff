"""The definition of correct for `attnpred.kernels.shared`: one loop per batch row, query head, query and token, in fp32."""

import math

import torch
from torch import Tensor

from attnpred.kernels.dense import AttentionTerms


def shared_attention(
    query: Tensor,
    own: Tensor,
    distant: Tensor,
    values: Tensor,
    sinks: int,
    recent: int,
    terms: AttentionTerms,
    mask: Tensor | None = None,
    first: Tensor | None = None,
    estimate: Tensor | None = None,
    tau: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output [B, Hq, Q, Dv] and the log-sum-exps [B, Hq, Q] of near and distant part; -inf for an empty one.

    query [B, Hq, Q, D], the last Q of L tokens; own, distant [B, Hkv, L, D]: keys of the layer, and of the group's lowest;
    values [B, Hkv, L, Dv]; mask [B, Q, L], True where allowed; first [B]: where each row begins; estimate [B, Hq, Q]: the
    distant part of a kv head is left out where sigmoid(near - estimate) >= tau for all its query heads.
    """
    batch, heads, queries, _ = query.shape
    length, group = own.shape[2], heads // own.shape[1]
    output = torch.zeros(batch, heads, queries, values.shape[3], dtype=torch.float32, device=query.device)
    sums = torch.full((2, batch, heads, queries), -torch.inf, dtype=torch.float32, device=query.device)
    for b in range(batch):
        begin = 0 if first is None else int(first[b])
        for i in range(queries):
            place = length - queries + i
            parts: list[tuple[list[tuple[int, float]], list[tuple[int, float]]]] = []
            for h in range(heads):
                near: list[tuple[int, float]] = []
                far: list[tuple[int, float]] = []
                for token in range(place + 1):
                    if mask is not None and not bool(mask[b, i, token]):
                        continue
                    is_near = token < begin + sinks or place - token < recent
                    key = (own if is_near else distant)[b, h // group, token]
                    logit = float(query[b, h, i].float() @ key.float()) * terms.scale
                    if terms.softcap is not None:
                        logit = terms.softcap * math.tanh(logit / terms.softcap)
                    (near if is_near else far).append((token, logit))
                parts.append((near, far))
            for h, (near, far) in enumerate(parts):
                together = range(h // group * group, h // group * group + group)
                enough = estimate is not None and all(
                    _sigmoid(_log_sum(parts[j][0]) - float(estimate[b, j, i])) >= tau for j in together
                )
                shown = near if enough else near + far
                sums[0, b, h, i] = _log_sum(near)
                sums[1, b, h, i] = -math.inf if enough else _log_sum(far)
                extra = [] if terms.sinks is None else [(-1, float(terms.sinks[h]))]
                total = _log_sum(shown + extra)
                for token, logit in shown:
                    output[b, h, i] += math.exp(logit - total) * values[b, h // group, token].float()
    return output.to(query.dtype), sums[0], sums[1]


def _log_sum(logits: list[tuple[int, float]]) -> float:
    top = max((logit for _, logit in logits), default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(logit - top) for _, logit in logits))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
