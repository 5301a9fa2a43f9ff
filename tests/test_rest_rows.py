"""Estimating what steps leave out: it comes from rows decoded once more, and brings the output nearer to the full one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.kernels.dense import AttentionTerms
from attnpred.policies import POLICIES, Predicted
from attnpred.rest_rows import ROWS
from attnpred.store.pool import BlockPool
from attnpred.telemetry import LayerCounts

P, KV_HEADS, HEADS, DIM, PROMPT, STEPS = 4, 2, 4, 16, 320, 12
CONFIG = CacheConfig(
    budget=15 * P, block_size=P, num_sink_tokens=P, recent_window=2 * P, history=32, estimate_rest=True
)
TERMS = AttentionTerms(0.25)


def text(batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys, values [B, heads, T, DIM]: values that have much in common, and queries too."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = (
        torch.randn(batch, heads, PROMPT + STEPS, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return queries + 1, keys, values + 1


def full(queries: Tensor, keys: Tensor, values: Tensor, terms: AttentionTerms = TERMS) -> Tensor:
    """Return the output of all queries, [B, Hq, T, DIM], causal."""
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    logits = (queries @ keys.transpose(-1, -2)) * terms.scale
    logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
    if terms.sinks is not None:
        extra = terms.sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.softmax(torch.cat((logits, extra), -1), -1)[..., :-1] @ values
    return torch.softmax(logits, -1) @ values


def decoded(
    config: CacheConfig, given: tuple[Tensor, Tensor, Tensor], policy: str = "predicted", prompt: int = PROMPT,
    terms: AttentionTerms = TERMS,
) -> tuple[LayerDecoder, Tensor]:  # fmt: skip
    """Return the decoder and its outputs [B, Hq, STEPS, DIM] after a prompt."""
    queries, keys, values = given
    decoder, pool = LayerDecoder(config, POLICIES[policy].untrained(P, 2, DIM), LayerCounts()), BlockPool(P)
    pool.append(keys[:, :, :prompt], values[:, :, :prompt])
    told = full(*(x[:, :, :prompt] for x in given), terms)
    decoder.observe(queries[:, :, :prompt], pool, terms, None, prompt=True, keys=keys[:, :, :prompt], output=told)
    outputs = []
    for t in range(prompt, prompt + STEPS):
        pool.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        outputs.append(decoder.step(queries[:, :, t], pool, terms, None))
    return decoder, torch.stack(outputs, 2)


def error(outputs: Tensor, given: tuple[Tensor, Tensor, Tensor], terms: AttentionTerms = TERMS) -> float:
    wanted = full(*given, terms)[:, :, PROMPT:]
    return float((outputs - wanted).norm() / wanted.norm())


SPARSE = [name for name in POLICIES if not POLICIES[name].is_dense and POLICIES[name].leader is Predicted.leader]


@pytest.mark.parametrize("policy", SPARSE)
def test_every_policy_comes_nearer_to_the_full_output(policy: str) -> None:
    given = text()
    if POLICIES[policy].reads_tokens:
        pytest.skip("asks for words")
    _, plain = decoded(replace(CONFIG, estimate_rest=False), given, policy)
    decoder, found = decoded(CONFIG, given, policy)
    assert decoder.rest is not None and decoder.rest.terms is not None
    assert error(found, given) < 0.7 * error(plain, given)


def test_only_what_was_made_for_it_estimates_unasked() -> None:
    asked = [name for name in SPARSE if POLICIES[name].estimates_rest]
    assert asked == ["predicted"]
    for name, wanted in (("predicted", True), ("ema", False)):
        decoder = LayerDecoder(replace(CONFIG, estimate_rest=None), POLICIES[name].untrained(P, 2, DIM), LayerCounts())
        assert (decoder.rest is not None) == wanted


def test_with_attention_sinks_of_the_model() -> None:
    given, terms = text(), AttentionTerms(0.25, sinks=torch.tensor([1.0, 2.0, 0.0, 3.0]))
    _, plain = decoded(replace(CONFIG, estimate_rest=False), given, terms=terms)
    _, found = decoded(CONFIG, given, terms=terms)
    assert error(found, given, terms) < 0.7 * error(plain, given, terms)


def test_a_short_call_teaches_nothing() -> None:
    queries, keys, values = text()
    decoder, _ = decoded(CONFIG, (queries, keys, values))
    assert decoder.rest is not None
    before = decoder.rest.state()
    pool = BlockPool(P)
    pool.append(keys, values)
    decoder.attend(queries[:, :, -(ROWS - 1) :], pool, TERMS, None, remember=True)
    assert all(before[name] is now for name, now in decoder.rest.state().items())
    decoder.attend(queries[:, :, -ROWS:], pool, TERMS, None, remember=True)
    assert all(before[name] is not now for name, now in decoder.rest.state().items())


def test_where_nothing_is_left_out_nothing_is_added() -> None:
    given = text()
    config = replace(CONFIG, budget=2 * PROMPT, dense_when_fits=False)
    decoder, found = decoded(config, given)
    torch.testing.assert_close(found, full(*given)[:, :, PROMPT:], rtol=1e-4, atol=1e-5)
    assert decoder.rest is not None and decoder.rest.terms is None


def test_rows_of_a_batch_are_what_they_are_alone() -> None:
    given = text(batch=2)
    _, both = decoded(CONFIG, given)
    for row in range(2):
        alone = tuple(x[row : row + 1] for x in given)
        torch.testing.assert_close(both[row : row + 1], decoded(CONFIG, alone)[1], rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_a_decoder_with_its_state_goes_on_alike() -> None:
    queries, keys, values = text()
    decoder, _ = decoded(CONFIG, (queries, keys, values))
    other = LayerDecoder(CONFIG, Predicted(), LayerCounts())
    other.restore({name: x.clone() if isinstance(x, Tensor) else x for name, x in decoder.state().items()})
    pool = BlockPool(P)
    pool.append(torch.cat((keys, keys[:, :, :1]), 2), torch.cat((values, values[:, :, :1]), 2))
    first, second = (d.step(queries[:, :, -1], pool, TERMS, None) for d in (decoder, other))
    assert torch.equal(first, second)
    decoder.clear()
    assert decoder.rest is not None and decoder.rest.terms is None
