"""The gate is what its description says, written as loops; it fits one model; its weights go to disk and back."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnpred.errors import PredictorError
from attnpred.predictor.pretrained import Predictor, PredictorConfig, model_card, shipped
from attnpred.predictor.seer_gate import GateKeys, GateMap, joined, pooled

P, HEADS, GROUP, DIM, RANK, BLOCKS = 4, 2, 3, 6, 5, 7


def random_gate(seed: int = 0, heads: int = HEADS) -> GateMap:
    generator = torch.Generator().manual_seed(seed)
    return GateMap(
        torch.randn(heads, GROUP * DIM, RANK, generator=generator),
        torch.randn(heads, 3 * DIM, RANK, generator=generator),
    )


def text(batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return keys of `BLOCKS` blocks, and a query."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, HEADS, BLOCKS * P, DIM, generator=generator)
    return keys, torch.randn(batch, HEADS * GROUP, DIM, generator=generator)


def gate_again(gate: GateMap, keys: Tensor, query: Tensor) -> list[float]:
    """Return the gate of every block of one kv head, for keys [L, D] and the queries [G, D] of its group."""
    values = keys.tolist()
    side_by_side = [x for one in query.tolist() for x in one]
    gate_query = [sum(x * float(w) for x, w in zip(side_by_side, gate[:, r], strict=True)) for gate in [gate.queries[0]] for r in range(RANK)]  # fmt: skip
    logits = []
    for block in range(len(values) // P):
        tokens = values[block * P : (block + 1) * P]
        channels = list(zip(*tokens, strict=True))
        pools = [max(c) for c in channels] + [min(c) for c in channels] + [sum(c) / P for c in channels]
        gate_key = [sum(x * float(w) for x, w in zip(pools, gate.keys[0, :, r], strict=True)) for r in range(RANK)]
        logits.append(sum(a * b for a, b in zip(gate_query, gate_key, strict=True)) / math.sqrt(RANK))
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def test_the_gate_against_loops() -> None:
    gate, (keys, query) = random_gate(), text()
    memory = GateKeys(P, gate)
    memory.seal(keys)
    for selecting in (HEADS, HEADS * GROUP):  # a selection for each query head is that of its group
        memory.look(query, 123.0, selecting)  # the scale of the logits is not the gate's
        assert memory.estimate.shape == (2, selecting, BLOCKS)
        for row in range(2):
            for head in range(selecting):
                kv = head * HEADS // selecting
                own = GateMap(gate.queries[kv : kv + 1], gate.keys[kv : kv + 1])
                want = gate_again(own, keys[row, kv], query[row, kv * GROUP : (kv + 1) * GROUP])
                torch.testing.assert_close(memory.estimate[row, head].exp(), torch.tensor(want), atol=1e-5, rtol=1e-4)


def test_gate_keys_are_made_once_and_are_all_that_is_kept() -> None:
    """Blocks that come one by one have the keys of blocks that come together; nothing is read but these."""
    gate, (keys, query) = random_gate(), text()
    at_once, in_turn = GateKeys(P, gate), GateKeys(P, gate)
    at_once.seal(keys)
    for block in range(BLOCKS):
        in_turn.seal(keys[:, :, block * P : (block + 1) * P])
        assert in_turn.bytes() == in_turn.look_bytes() == 2 * HEADS * (block + 1) * RANK * 4
    for memory in (at_once, in_turn):
        memory.look(query, 1.0, HEADS)
    torch.testing.assert_close(at_once.estimate, in_turn.estimate)
    half = GateKeys(P, gate)
    half.seal(keys.to(torch.bfloat16))
    assert half.bytes() == at_once.bytes() // 2
    half.look(query.to(torch.bfloat16), 1.0, HEADS)
    assert half.estimate.dtype == torch.float32
    torch.testing.assert_close(half.estimate, at_once.estimate, atol=0.5, rtol=0)


def test_one_gate_may_serve_all_heads() -> None:
    shared, (keys, query) = random_gate(heads=1), text()
    own = GateMap(shared.queries.expand(HEADS, -1, -1), shared.keys.expand(HEADS, -1, -1))
    found = []
    for gate in (shared, own):
        memory = GateKeys(P, gate)
        memory.seal(keys)
        memory.look(query, 1.0, HEADS)
        found.append(memory.estimate)
    torch.testing.assert_close(found[0], found[1])


def test_a_gate_of_another_model_is_refused() -> None:
    with pytest.raises(
        PredictorError, match=r"got 3 kv heads with 3 queries of 6, expected 2 with 3 of 6: the gate was"
    ):
        GateKeys(P, random_gate()).seal(torch.randn(1, 3, P, DIM))
    with pytest.raises(PredictorError, match=r"queries of 9, expected any number of with 3 of 6: the gate was trained"):
        GateKeys(P, random_gate(heads=1)).seal(torch.randn(1, 3, P, 9))
    memory = GateKeys(P, random_gate())
    memory.seal(torch.randn(1, HEADS, P, DIM))
    with pytest.raises(PredictorError, match=r"got 2 kv heads with 2 queries of 6, expected 2 with 3 of 6"):
        memory.look(torch.randn(1, HEADS * 2, DIM), 1.0, HEADS)


def test_untrained_it_is_the_mean_key_and_the_sum_of_the_queries() -> None:
    made = Predictor(PredictorConfig("seer-gate", P, group=GROUP, head_dim=DIM, rank=DIM))
    keys, query = text()
    memory = GateKeys(P, made.gate.gate_map(0))
    memory.seal(keys)
    memory.look(query, 1.0, HEADS)
    means = keys.unflatten(2, (BLOCKS, P)).mean(3)
    logits = torch.einsum("bhd,bhnd->bhn", query.unflatten(1, (HEADS, GROUP)).sum(2), means) / math.sqrt(DIM)
    torch.testing.assert_close(memory.estimate, torch.log_softmax(logits, -1), atol=1e-4, rtol=1e-4)


def test_pools_and_queries_lie_side_by_side() -> None:
    block = torch.tensor([[1.0, -4.0], [3.0, 2.0]])
    assert pooled(block).tolist() == [3.0, 2.0, 1.0, -4.0, 2.0, -1.0]
    query = torch.arange(8.0).view(1, 4, 2)
    assert joined(query, 2).tolist() == [[[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]]


def test_a_gate_goes_to_disk_and_back_in_half_precision(tmp_path: Path) -> None:
    config = PredictorConfig("seer-gate", P, layers="0 3", heads=HEADS, group=GROUP, head_dim=DIM, rank=RANK)
    made = Predictor(config)
    with torch.no_grad():
        for parameter in made.gate.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    loaded = Predictor.from_pretrained(made.save_pretrained(tmp_path))
    assert loaded.config == config
    for name, tensor in made.network.state_dict().items():
        assert tensor.dtype == torch.float16 and torch.equal(loaded.network.state_dict()[name], tensor)
    found = loaded.gate.gate_map(loaded.place(3))
    assert found.queries.shape == (HEADS, GROUP * DIM, RANK) and found.keys.dtype == torch.float32
    with pytest.raises(PredictorError, match="got no weights for layer 1, expected layers"):
        loaded.place(1)
    with pytest.raises(AssertionError):
        _ = loaded.cnn


def test_the_shipped_gate_is_small_and_names_its_model() -> None:
    folder = shipped()["seer-demo"]
    made = Predictor.from_pretrained(folder)
    assert made.config.kind == "seer-gate" and made.config.base_model and made.config.fingerprint
    assert sum(file.stat().st_size for file in folder.iterdir()) < 300_000
    untrained = Predictor(made.config).network.state_dict()
    assert not any(torch.equal(tensor, untrained[name]) for name, tensor in made.network.state_dict().items())
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith(model_card(made.config)) and "for policy `seer`" in card and "Forecasts" not in card
