"""What a decode step promises whatever the policy: run over the table, so that the line there holds a new policy to it."""

import copy
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnpred
from attnpred.config import CacheConfig
from attnpred.policies import POLICIES
from attnpred.policies.base import KINDS, Policy
from tests.hf.support import SMALL, greedy
from tests.models import prompt, tiny_model
from tests.policies.layer import CONFIG, GROUP, HEADS, KV_HEADS, SCALE, Layer, P, Text, kept, make

PROMPT, STEPS = 101, 9
NAMES = [name for name in POLICIES if not POLICIES[name].is_dense]


class Stack:
    """A layer that decodes with a policy, and before it the layer that chooses for it, if the policy has such."""

    def __init__(self, policy: Policy[Any], config: CacheConfig = CONFIG) -> None:
        leads = policy.leader(5, range(16)) != 5
        self.layers = [Layer(policy, config)] if leads else []
        self.layers.append(Layer(policy, config, 5, self.layers[0].decoder.memory if leads else None))

    @property
    def last(self) -> Layer:
        return self.layers[-1]

    def prompt(self, text: Text, tokens: int = PROMPT) -> "Stack":
        for layer in self.layers:
            layer.prompt(text, tokens)
        return self

    def steps(self, text: Text, first: int, last: int) -> "Stack":
        for t in range(first, last):
            for layer in self.layers:
                layer.step(text, t)
        return self

    def change(self, name: str, argument: Any) -> "Stack":
        for layer in self.layers:
            getattr(layer.pool, name)(argument)
            getattr(layer.decoder, name)(argument)
        return self


def decoded(name: str, text: Text, config: CacheConfig = CONFIG) -> Layer:
    return Stack(make(name), config).prompt(text).steps(text, PROMPT, PROMPT + STEPS).last


def row_of(text: Text, *rows: int) -> Text:
    one = copy.copy(text)
    one.queries, one.keys, one.values = (x[list(rows)] for x in (text.queries, text.keys, text.values))
    return one


@pytest.mark.parametrize("name", NAMES)
def test_a_selection_keeps_to_the_budget_and_to_what_is_always_in(name: str) -> None:
    layer = decoded(name, Text(PROMPT + STEPS, batch=2))
    for step, selection in enumerate(layer.blocks):
        length = PROMPT + step + 1
        assert selection.shape[:2] == (2, KV_HEADS) and layer.outputs[step].shape == (2, HEADS, 8)
        assert layer.outputs[step].isfinite().all()
        for ids in selection.flatten(0, 1).tolist():
            blocks = [block for block in ids if block >= 0]
            assert len(set(blocks)) == len(blocks) and max(blocks) < math.ceil(length / P)
            assert kept(length) <= set(blocks)
            unfilled = math.ceil(length / P) * P - length
            decoded_since = step + 1 if POLICIES[name].keeps_decoded else 0
            assert len(blocks) * P - unfilled <= CONFIG.budget + decoded_since


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_every_time_and_moves_no_generator(name: str) -> None:
    text, before = Text(PROMPT + STEPS), torch.random.get_rng_state()
    policy = make(name)
    before = torch.random.get_rng_state()
    runs = [Stack(policy).prompt(text).steps(text, PROMPT, PROMPT + STEPS).last for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, *(run.outputs for run in runs))) and all(
        map(torch.equal, *(run.blocks for run in runs))
    )


@pytest.mark.parametrize("name", NAMES)
def test_with_a_budget_for_everything_it_is_dense_attention(name: str) -> None:
    text = Text(PROMPT + STEPS, batch=2)
    layer = decoded(name, text, replace(CONFIG, budget=100_000, dense_when_fits=False))
    for step, output in enumerate(layer.outputs):
        t = PROMPT + step
        keys, values = (x[:, :, : t + 1].repeat_interleave(GROUP, 1) for x in (text.keys, text.values))
        weights = torch.softmax((text.queries[:, :, t, None] @ keys.transpose(2, 3)) * SCALE, -1)
        torch.testing.assert_close(output, (weights @ values)[:, :, 0], atol=1e-5, rtol=1e-5)


def sets(selection: Tensor) -> list[list[set[int]]]:
    return [[set(ids) - {-1} for ids in row] for row in selection.tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_know_nothing_of_each_other(name: str) -> None:
    text = Text(PROMPT + STEPS, batch=3)
    together = decoded(name, text)
    for row in range(3):
        alone = decoded(name, row_of(text, row))
        for step in range(STEPS):
            assert sets(together.blocks[step])[row] == sets(alone.blocks[step])[0]
            torch.testing.assert_close(together.outputs[step][row], alone.outputs[step][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["select", "repeat", "fork", "state"])
@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_after_a_change_as_without(name: str, change: str) -> None:
    """Rows in another order, one of them twice; each row twice; a copy; the state through a file."""
    text, middle = Text(PROMPT + STEPS, batch=2), PROMPT + 4
    stack = Stack(make(name)).prompt(text).steps(text, PROMPT, middle)
    want = copy.deepcopy(stack).steps(text, middle, PROMPT + STEPS).last.outputs[4:]
    rows = {"select": [1, 0, 1], "repeat": [0, 0, 1, 1]}.get(change, [0, 1])
    if change == "fork":
        other = copy.deepcopy(stack)
        stack.steps(Text(PROMPT + STEPS, batch=2, seed=9), middle, PROMPT + STEPS)  # goes another way
        stack = other
    elif change == "state":
        fresh = Stack(make(name))
        for old, new in zip(stack.layers, fresh.layers, strict=True):
            state = {key: x.clone() if isinstance(x, Tensor) else x for key, x in old.decoder.state().items()}
            numbers = json.loads(json.dumps({key: x for key, x in state.items() if not isinstance(x, Tensor)}))
            new.decoder.restore(state | numbers)
            new.pool, new.outputs = old.pool, old.outputs
        stack = fresh
    else:
        stack.change(change, torch.tensor(rows) if change == "select" else 2)
    got = stack.steps(row_of(text, *rows), middle, PROMPT + STEPS).last.outputs[4:]
    assert all(torch.equal(one, other[rows]) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_after_a_crop_only_what_is_left_is_chosen(name: str) -> None:
    """And what is put in the place of the removed tokens is what counts."""
    text, length = Text(PROMPT + STEPS), PROMPT - 22
    for crop in (length, length - length % P):
        stack = Stack(make(name)).prompt(text).steps(text, PROMPT, PROMPT + STEPS).change("crop", crop)
        other = Text(PROMPT + STEPS, seed=4)
        got = stack.steps(other, crop, crop + 2 * P).last
        for step, selection in enumerate(got.blocks[STEPS:]):
            blocks = math.ceil((crop + step + 1) / P)
            for ids in selection[0].tolist():
                assert max(ids) < blocks and len(set(ids) - {-1}) == len([i for i in ids if i >= 0])
                # What was dropped does not come back because the recent window moved over its place.
                assert POLICIES[name].evicts or kept(crop + step + 1) <= set(ids)
        joined = copy.copy(text)
        for part in ("queries", "keys", "values"):
            whole = torch.cat((getattr(text, part)[:, :, :crop], getattr(other, part)[:, :, crop:]), 2)
            setattr(joined, part, whole)
        for t, output, selection in zip(
            range(crop, crop + 2 * P), got.outputs[STEPS:], got.blocks[STEPS:], strict=True
        ):
            for h in range(HEADS):
                tokens = [
                    i for b in selection[0, h // GROUP].tolist() if b >= 0 for i in range(b * P, b * P + P) if i <= t
                ]
                keys, values = joined.keys[0, h // GROUP, tokens], joined.values[0, h // GROUP, tokens]
                weights = torch.softmax(keys @ other.queries[0, h, t] * SCALE, -1)
                torch.testing.assert_close(output[0, h], weights @ values, atol=1e-5, rtol=1e-5)
        # What is chosen by keys and the query alone does not depend on what was there before.
        if POLICIES[name].needs_query and not POLICIES[name].leaves_out:  # (clusters depend on when they were made)
            fresh = Stack(make(name)).prompt(joined, crop).steps(joined, crop, crop + 2 * P).last
            assert list(map(sets, got.blocks[STEPS:])) == list(map(sets, fresh.blocks))


@pytest.mark.parametrize("name", POLICIES)
def test_it_says_what_it_is(name: str) -> None:
    policy = POLICIES[name]
    assert policy.kind in KINDS and policy.cost and policy.source
    assert policy.__doc__ and "\n" not in policy.cost + policy.source


TOY = '''"""`toy`: every other block, odd ones first."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from attnpred.policies.base import Policy, View
from attnpred.predictor.memory import NoMemory


@final
@dataclass(frozen=True, slots=True)
class Toy(Policy[NoMemory]):
    """Score a block by whether its number is odd."""

    def score(self, view: View[NoMemory]) -> Tensor:
        return (torch.arange(view.zone.blocks) % 2).float()[None, None]
'''


def test_a_new_policy_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    spec = importlib.util.spec_from_file_location("toy", tmp_path / "toy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy", module)
    spec.loader.exec_module(module)

    monkeypatch.setitem(POLICIES, "toy", module.Toy)  # the line in the table

    test_a_selection_keeps_to_the_budget_and_to_what_is_always_in("toy")
    test_it_is_the_same_every_time_and_moves_no_generator("toy")
    test_with_a_budget_for_everything_it_is_dense_attention("toy")
    test_rows_of_a_batch_know_nothing_of_each_other("toy")
    test_after_a_crop_only_what_is_left_is_chosen("toy")
    for change in ("select", "repeat", "fork", "state"):
        test_it_goes_on_after_a_change_as_without("toy", change)
    test_it_says_what_it_is("toy")
    model = tiny_model("llama")
    with attnpred.attach(model, policy="toy", config=SMALL) as attached:
        greedy(model, prompt(1, 100), 4)
        assert attached.stats()["total"]["sparse_steps"] > 0
    from attnpred.cli.main import main

    assert main(["info"]) == 0 and "odd" in capsys.readouterr().out
