"""A call of several tokens after others, which is what a question is, shows a memory all keys anew, as means."""

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.digest import pack
from attnpred.policies import Predicted
from attnpred.predictor.digest import TURN
from attnpred.store.pool import BlockPool
from attnpred.telemetry import LayerCounts

P, KV_HEADS, HEADS, DIM = 4, 2, 4, 16
TERMS = AttentionTerms(0.5)


def layer() -> tuple[LayerDecoder, BlockPool]:
    config = CacheConfig(budget=48, num_sink_tokens=P, recent_window=2 * P, history=16)
    return LayerDecoder(config, Predicted(), LayerCounts()), BlockPool(P)


def read(decoder: LayerDecoder, pool: BlockPool, tokens: int) -> None:
    """Give them a chunk, the first one as a prompt."""
    keys, query = torch.randn(1, KV_HEADS, tokens, DIM), torch.randn(1, HEADS, tokens, DIM)
    is_prompt = pool.length == 0
    pool.append(keys, torch.randn(1, KV_HEADS, tokens, DIM))
    if is_prompt:
        decoder.observe(query, pool, TERMS, None, prompt=True, keys=keys)
    else:
        decoder.attend(query, pool, TERMS, None, remember=True)


def test_a_chunk_codes_all_keys_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By means over all keys, which come in pieces, and in directions of its own queries."""
    monkeypatch.setattr(BlockPool, "piece_tokens", 16)
    torch.manual_seed(0)
    decoder, pool = layer()
    digest = decoder.memory.digest
    read(decoder, pool, 64)
    before = digest.to_keys
    read(decoder, pool, TURN + 3)
    length = pool.length // P * P
    means = pool.view()[0][:, :, :length].unflatten(2, (-1, P)).mean(3)
    assert digest.sealed == length // P and not torch.equal(digest.to_keys, before)
    torch.testing.assert_close(digest.centre, means.mean(2, keepdim=True))
    codes = pack((means - digest.centre) @ digest.to_keys)
    assert (digest.codes.view() == codes).float().mean() > 0.99  # means are summed in another order


def test_a_few_tokens_leave_the_directions_as_they_are() -> None:
    torch.manual_seed(0)
    decoder, pool = layer()
    digest = decoder.memory.digest
    read(decoder, pool, 64)
    before, codes = digest.to_keys, digest.codes.view().clone()
    read(decoder, pool, TURN - 1)
    assert digest.to_keys is before and torch.equal(digest.codes.view()[:, :, : codes.shape[2]], codes)
    assert digest.sealed == pool.length // P and not digest.met.numel()
