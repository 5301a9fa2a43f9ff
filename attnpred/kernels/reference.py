"""The definition of correct: one loop per batch row, query head and token, all in fp32.

Softmax over the tokens of the selected blocks that exist (position below `length`), that the mask allows, plus the
optional attention-sink logit of the head, which takes part in the normaliser and has no value.
"""

import math

import torch
from torch import Tensor


def sparse_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    selection: Tensor,
    length: int,
    *,
    block_size: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one query per row over selected blocks.

    query [B, Hq, D]; keys [B, Hkv, slots * P, D], values [..., Dv]; selection [B, Hs, K] of block ids, -1 for none, none
    twice; slots [B, Hs, K]: where these blocks lie in keys and values, None if slot i holds block i; sinks [Hq] logits;
    mask [B, >= length], True where attention is allowed.
    Returns output [B, Hq, Dv]; block maxima [B, Hs, K], the largest probability in each selected block over the query
    heads that share it; log-sum-exp [B, Hq].
    """
    batch, heads, _ = query.shape
    kv_heads, selecting, chosen = keys.shape[1], selection.shape[1], selection.shape[2]
    output = torch.zeros(batch, heads, values.shape[3], dtype=torch.float32, device=query.device)
    maxima = torch.zeros(selection.shape, dtype=torch.float32, device=query.device)
    normaliser = torch.zeros(batch, heads, dtype=torch.float32, device=query.device)
    for b in range(batch):
        for h in range(heads):
            kv, s = h * kv_heads // heads, h * selecting // heads
            logits: list[tuple[int, int, float]] = []
            for slot in range(chosen):
                block = int(selection[b, s, slot])
                shift = 0 if slots is None else (int(slots[b, s, slot]) - block) * block_size
                for token in range(block * block_size, (block + 1) * block_size) if block >= 0 else ():
                    if token >= length or (mask is not None and not bool(mask[b, token])):
                        continue
                    logit = float(query[b, h].float() @ keys[b, kv, token + shift].float()) * scale
                    if softcap is not None:
                        logit = softcap * math.tanh(logit / softcap)
                    logits.append((slot, token + shift, logit))
            extra = [float(sinks[h])] if sinks is not None else []
            top = max([*(logit for _, _, logit in logits), *extra])
            total = sum(math.exp(logit - top) for _, _, logit in logits) + sum(math.exp(x - top) for x in extra)
            normaliser[b, h] = top + math.log(total)
            for slot, token, logit in logits:
                probability = math.exp(logit - top) / total
                output[b, h] += probability * values[b, kv, token].float()
                maxima[b, s, slot] = max(float(maxima[b, s, slot]), probability)
    return output.to(query.dtype), maxima, normaliser
