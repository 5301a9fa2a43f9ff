"""A saved cache is for the weights that computed its keys: any other, retrained or adapted, is refused; the same never."""

import copy
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import attnpred
from attnpred.errors import CacheFileError
from attnpred.hf import TieredCache, cache_argument
from attnpred.hf.weights import alike, answers, hash_samples
from tests.hf.support import SMALL
from tests.hf.test_fork import logits
from tests.models import FAMILIES, prompt, tiny_model

OTHER = r"saved with other weights of .*, expected the same, with the same adapters at work: load the model as it was"


class Adapted(nn.Module):
    """A projection with something of low rank added, as many libraries do it: `is_on` says whether it acts."""

    def __init__(self, base: nn.Linear, size: float = 0.1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.base, self.is_on = base, True
        self.down = nn.Parameter(torch.randn(4, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * size)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x)
        return found + x @ self.down.T @ self.up.T if self.is_on else found


def model(family: str = "llama") -> Any:
    """Return a model of its own, whose config is also its own."""
    return copy.deepcopy(tiny_model(family))


def save(model: Any, path: Path) -> None:
    with attnpred.attach(model, policy="ema", config=SMALL) as handle, handle.new_cache() as cache:
        logits(model, cache, prompt(1, 40))
        cache.save(path)


def attention_of(model: Any, layer: int) -> Any:
    return model.model.layers[layer].self_attn


def retrained(model: Any) -> None:
    model.train()
    model(prompt(1, 20), labels=prompt(1, 20)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    model.eval()


@torch.no_grad()
def one_value_projection(model: Any) -> None:
    attention_of(model, 2).v_proj.weight.mul_(1.0001)


@torch.no_grad()
def feed_forward(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.add_(1e-5)


def adapter(model: Any) -> None:
    attention_of(model, 1).k_proj = Adapted(attention_of(model, 1).k_proj)


def hook(model: Any) -> None:
    attention_of(model, 1).v_proj.register_forward_hook(lambda _module, _inputs, output: output * 1.1)


@pytest.mark.parametrize("change", [retrained, one_value_projection, feed_forward, adapter, hook])
def test_other_weights_are_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    """Both ways, without names that could tell them apart."""
    first, second = model(), model()
    change(second)
    for one, other in ((first, second), (second, first)):
        save(one, tmp_path / "a.kv")
        TieredCache.load(tmp_path / "a.kv", one).close()
        with pytest.raises(CacheFileError, match=OTHER):
            TieredCache.load(tmp_path / "a.kv", other)


def test_an_adapter_that_is_switched_is_noticed(tmp_path: Path) -> None:
    mine = model()
    adapter(mine)
    save(mine, tmp_path / "on.kv")
    attention_of(mine, 1).k_proj.is_on = False
    with pytest.raises(CacheFileError, match=OTHER):
        TieredCache.load(tmp_path / "on.kv", mine)
    attention_of(mine, 1).k_proj.is_on = True
    TieredCache.load(tmp_path / "on.kv", mine).close()


class Tuner(nn.Module):
    """What PEFT's layers say of themselves."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.disable_adapters, self.merged_adapters = base, False, list[str]()
        self.active_adapters, self.scaling = ["default"], {"default": 2.0, "second": 2.0}
        kinds = {"lora_A": (base.in_features, 4), "lora_B": (4, base.out_features)}
        for name, sizes in kinds.items():
            setattr(self, name, nn.ModuleDict({one: nn.Linear(*sizes, bias=False) for one in self.scaling}))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base_layer(x)
        if not self.disable_adapters and not self.merged_adapters:
            for name in self.active_adapters:
                found = found + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]  # type: ignore[index,operator]
        return found


@pytest.mark.parametrize("place", ["self_attn.k_proj", "mlp.up_proj"])
def test_of_adapters_those_count_that_act(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: Any = types.ModuleType("peft.tuners.tuners_utils")
    known.BaseTunerLayer = Tuner
    monkeypatch.setitem(sys.modules, known.__name__, known)
    plain, mine = model(), model()
    part, _, name = place.partition(".")
    parent = getattr(mine.model.layers[1], part)
    tuner = Tuner(getattr(parent, name))
    setattr(parent, name, tuner)
    save(plain, tmp_path / "plain.kv")
    save(mine, tmp_path / "on.kv")
    states: list[tuple[str, Any, Any]] = [
        ("", None, "on.kv"),
        ("disable_adapters", True, "plain.kv"),
        ("active_adapters", [], "plain.kv"),
        ("active_adapters", ["second"], None),
        ("scaling", {"default": 1.0}, None),
        ("merged_adapters", ["default"], "plain.kv"),  # nothing was added to the weights here
    ]
    for attribute, value, fits in states:
        before = vars(tuner).get(attribute)
        vars(tuner)[attribute] = value
        for file in ("plain.kv", "on.kv"):
            if file == fits:
                TieredCache.load(tmp_path / file, mine).close()
            else:
                with pytest.raises(CacheFileError, match=OTHER):
                    TieredCache.load(tmp_path / file, mine)
        vars(tuner)[attribute] = before


# The same weights


CHILD = """
import sys, torch
from transformers import AutoModelForCausalLM
from attnpred.hf.weights import answers, hash_samples
torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(hash_samples(model), answers(model))
"""


def test_the_same_weights_have_the_same_marks_in_every_process(tmp_path: Path) -> None:
    mine = model()
    mine.save_pretrained(tmp_path / "folder")
    wanted = f"{hash_samples(mine)} {answers(mine)}"
    for threads in ("1", "2"):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "folder"), threads]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == wanted
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    save(mine, tmp_path / "a.kv")
    TieredCache.load(tmp_path / "a.kv", again).close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_answers_and_no_two_layers_the_same(family: str) -> None:
    found = answers(tiny_model(family))
    assert len(found) >= 2 and len({str(numbers) for numbers in found}) == len(found)
    assert alike(found, answers(model(family)), torch.float32)


def test_answers_are_equal_but_for_the_rounding_of_a_sum() -> None:
    mine = model()
    adapter(mine)
    found = answers(mine)
    for dtype, size, same in ((torch.float32, 1e-4, True), (torch.float32, 1e-2, False), (torch.bfloat16, 1e-2, True)):
        assert alike(found, [[x * (1 + size) for x in numbers] for numbers in found], dtype) is same
    assert not alike(found, found[1:], torch.float32) and not alike(found, [x[1:] for x in found], torch.float32)


def test_marking_leaves_everything_as_it_was(tmp_path: Path) -> None:
    mine = model()
    before, state = torch.get_rng_state(), copy.deepcopy(mine.state_dict())
    save(mine, tmp_path / "a.kv")
    TieredCache.load(tmp_path / "a.kv", mine).close()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[name], tensor) for name, tensor in mine.state_dict().items())


# Which model it was


def test_a_cache_knows_the_attached_model_that_filled_it(tmp_path: Path) -> None:
    mine, tokens = model(), prompt(1, 40)
    with attnpred.attach(mine, policy="ema", config=SMALL) as handle:
        by_hand = TieredCache(mine.config, policy="ema", config=SMALL)
        mine(tokens, cache=by_hand)
        embedded = handle.new_cache()
        mine(inputs_embeds=mine.get_input_embeddings()(tokens).detach(), cache=embedded)
        generated = TieredCache(mine.config, policy="ema", config=SMALL)
        mine.generate(tokens, cache=generated, max_new_tokens=2)
    for cache in (by_hand, by_hand.fork(), embedded, generated):
        assert cache.model is not None and cache.model() is mine
        cache.save(tmp_path / "a.kv")
        assert TieredCache.load(tmp_path / "a.kv", mine).model == weakref.ref(mine)


def test_a_cache_of_an_unknown_model_is_saved_with_it(tmp_path: Path) -> None:
    mine = model()
    cache = TieredCache(mine.config, policy="ema", config=SMALL)
    mine(prompt(1, 40), **cache_argument(cache))  # not attached
    with pytest.raises(
        CacheFileError, match=r"^got a cache of a model that is not known .*: save\(path, model=model\)$"
    ):
        cache.save(tmp_path / "a.kv")
    cache.save(tmp_path / "a.kv", model=mine)
    TieredCache.load(tmp_path / "a.kv", mine).close()
