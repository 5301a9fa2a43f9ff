"""The rivals' benchmark: ours is measured after the prompt that was asked for, and gives the weights back to nobody else."""

import argparse
from typing import Any

import pytest
import torch

from benchmarks import rivals
from tests.models import tiny_model

IDS = torch.arange(600).remainder(89).add(3).tolist()


class Fixed:
    """An engine that takes no time."""

    def __init__(self, token: int) -> None:
        self.token, self.asked = token, list[tuple[int, int]]()

    def read(self, ids: Any) -> float:
        return 100.0 * len(ids)

    def decode(self, ids: Any, steps: int) -> float:
        self.asked.append((len(ids), steps))
        return float(len(self.asked))

    def likeliest(self, ids: Any) -> int:
        return self.token


def test_ours_decodes_after_the_prompt_and_shares_the_weights() -> None:
    pytest.importorskip("numba")
    model: Any = tiny_model("llama")
    engines = [rivals.Ours(model, weights) for weights in (None, "int8")] + [rivals.Ours(model, None, is_stock=True)]
    assert all(engine.model.lm_head.weight is model.lm_head.weight for engine in engines)
    for engine in engines:
        assert engine.read(IDS) > 0 and engine.decode(IDS, 3) > 0
        assert engine.cache.get_seq_length() == len(IDS) + 3
    assert engines[0].attached.stats()["fast_bytes"] == 0 and "weights" in engines[1].attached.stats()
    assert engines[0].likeliest(IDS[:40]) == engines[2].likeliest(IDS[:40])
    assert "forward" not in vars(model.lm_head) and "generate" not in vars(model)


def test_turns_are_taken_and_the_first_is_not_counted() -> None:
    made = {("attnpred", "fp32", "fp32"): Fixed(1), ("llama.cpp", "Q8_0", "f16"): Fixed(1)}
    rows = rivals.measure("smollm2", made, IDS[:50], argparse.Namespace(rounds=4, steps=7))
    assert [row["ms_per_token"] for row in rows] == [3.5, 3.5] and rows[1]["prompt_ms"] == 5000.0
    assert made["llama.cpp", "Q8_0", "f16"].asked == [(50, 7)] * 5
    assert {"model", "context", "engine", "weights", "kv", "ms_per_token", "prompt_ms"} <= set(rows[0])


def test_other_tokens_from_the_same_weights_end_the_run() -> None:
    same = {("attnpred", "fp32", "fp32"): Fixed(1), ("attnpred", "int8", "fp32"): Fixed(2)}
    assert rivals.check(same, IDS) == {"attnpred/fp32/fp32": 1, "attnpred/int8/fp32": 2}
    with pytest.raises(SystemExit, match="got different next tokens"):
        rivals.check({("attnpred", "fp32", "fp32"): Fixed(1), ("transformers", "fp32", "fp32"): Fixed(2)}, IDS)
