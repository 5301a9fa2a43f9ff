"""Similarities and groups by their definition, and a file that says what is wrong with it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attnpred.errors import ConfigError, ShapeError
from attnpred.predictor.layer_groups import LayerGroups, group_layers, grouped, jensen_shannon, similarities

SAID: dict[str, Any] = {
    "base_model": "m", "fingerprint": "f", "query_heads": 4, "kv_heads": 2, "layers": (1, 3, 5, 7), "rows": 9
}  # fmt: skip


def naive_divergence(p: list[float], q: list[float]) -> float:
    """Loop over the outcomes; what is missing to 1 is one more."""
    found = 0.0
    for a, b in zip([*p, max(0.0, 1 - sum(p))], [*q, max(0.0, 1 - sum(q))], strict=True):
        for x in (a, b):
            if x > 1e-12:
                found += 0.5 * x * math.log2(x / ((a + b) / 2))
    return found


def test_the_divergence_is_the_loop_and_lies_between_0_and_1_bit() -> None:
    torch.manual_seed(0)
    p, q = torch.softmax(3 * torch.randn(2, 5, 7), -1)
    p[0], q[0] = torch.eye(7)[1], torch.eye(7)[4]  # nothing in common
    p[1], q[2] = p[1] * 0.6, q[2] * 0.3  # the rest at a sink
    q[3] = p[3]
    found = jensen_shannon(p, q)
    for i in range(5):
        assert found[i] == pytest.approx(naive_divergence(p[i].tolist(), q[i].tolist()), abs=1e-6)
    assert found[0] == pytest.approx(1) and found[3] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(found, jensen_shannon(q, p))


def test_similarities_are_means_over_rows_and_the_query_heads_of_a_kv_head() -> None:
    torch.manual_seed(0)
    rows = torch.softmax(2 * torch.randn(3, 4, 6, 9), -1)  # layers, query heads, rows, tokens
    found = similarities(rows, 2)
    for kv in range(2):
        for low in range(3):
            for high in range(3):
                each = [
                    1 - naive_divergence(rows[low, h, t].tolist(), rows[high, h, t].tolist())
                    for h in (2 * kv, 2 * kv + 1)
                    for t in range(6)
                ]
                assert found[kv, low, high] == pytest.approx(sum(each) / 12, abs=1e-5)
    with pytest.raises(ShapeError, match="got 4 query heads for 3 kv heads"):
        similarities(rows, 3)


def test_a_layer_joins_while_it_is_similar_to_every_layer_of_the_group() -> None:
    similar = torch.eye(5)
    for low, high, value in ((0, 1, 0.6), (1, 2, 0.9), (0, 2, 0.4), (2, 3, 0.5), (3, 4, 0.7), (2, 4, 0.8)):
        similar[low, high] = similar[high, low] = value
    assert group_layers(similar, 0.5) == [[0, 1], [2, 3, 4]]  # 2 is similar to 1, but not to 0; 0.5 is enough
    assert group_layers(similar, 0.0) == [[0, 1, 2, 3, 4]]
    assert group_layers(similar, 0.95) == [[0], [1], [2], [3], [4]]


@pytest.fixture
def some() -> LayerGroups:
    similar = torch.ones(2, 4, 4) * 0.7
    similar[1, 2:, :2] = similar[1, :2, 2:] = 0.2
    return grouped(similar, 0.5, **SAID)


def test_groups_are_told_by_the_model_s_own_layers(some: LayerGroups) -> None:
    assert some.groups == (((1, 3, 5, 7),), ((1, 3), (5, 7)))
    assert some.leaders() == {1: (1, 1), 3: (1, 1), 5: (1, 5), 7: (1, 5)}
    assert some.shares and some.dropped == 1 - 3 / 8
    apart = some.regrouped(0.9)
    assert not apart.shares and apart.dropped == 0 and apart.leaders() == {i: (i, i) for i in (1, 3, 5, 7)}


def test_a_file_gives_back_what_was_saved(some: LayerGroups, tmp_path: Path) -> None:
    some.save(tmp_path / "g.json")
    assert LayerGroups.load(tmp_path / "g.json") == some
    assert [path.name for path in tmp_path.iterdir()] == ["g.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attnpred_layer_groups": 2}, "of another version"),
        ({"kv_heads": None}, "expected a file of `attnpred analyse-layers`"),
        ({"kv_heads": 3}, "got groups of 2 heads, expected 3"),
        ({"groups": [[[1, 3], [7, 5]], [[1, 3, 5, 7]]]}, "of head 0, expected every layer once and in order"),
        ({"groups": [[[1, 3, 5, 7]], [[1, 3, 5]]]}, "of head 1, expected every layer once and in order"),
        ({"more": 1}, "which is none"),
    ],
)
def test_a_wrong_file_is_refused(some: LayerGroups, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "g.json"
    some.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        LayerGroups.load(path)


def test_no_file_and_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text("{")
    for name in ("g.json", "none.json"):
        with pytest.raises(ConfigError, match=r"got .*json.*, expected a file of `attnpred analyse-layers`"):
            LayerGroups.load(tmp_path / name)


def test_delta_is_a_similarity() -> None:
    with pytest.raises(ConfigError, match=r"got delta=1.5"):
        grouped(torch.ones(2, 4, 4), 1.5, **SAID)
