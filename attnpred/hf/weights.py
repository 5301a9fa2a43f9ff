"""What computed the keys: marks of a model's weights, to know them again when a saved cache is loaded.

A config says nothing of the weights: a retrained model has the config of the one before. So a saved cache has two marks.

*Samples* of every tensor of the model, hashed: exact, the same in any process and on any device, and any training changes
them; what weights are packed in is hashed too (`attnpred.hf.packing`). Of adapters only those count that act: one that is
switched off changes nothing, one that is merged is in the weights.

*Answers* of every projection to keys or values, fused ones as well, to the same few inputs: they see whatever is wrapped or
hooked around it. An input is 1 in one place, so that a plain projection answers with its own weights, whose rounding depends
on no device; what an adapter adds is a sum, so answers are compared as numbers, not as bits.

Both together take some 20 ms for a model of 135 M parameters (docs/LOG.md), and read next to nothing of it.
"""

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")

SAMPLES = 128
"""Numbers of each tensor."""
INPUTS = 8
ANSWERS = 16
"""Numbers of each projection."""
LEAST_TOLERANCE = 2e-3
"""Of the largest answer: products in TF32 have as much. Types with less precision have twice their own."""

PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "wqkv")
"""How models call their projections to keys or values, in a module that has a `layer_idx`."""


def hash_samples(model: nn.Module) -> str:
    """Return the SHA-256 of samples of all tensors that act."""
    digest, idle = hashlib.sha256(), set[int]()
    for name, module in model.named_modules():
        kind = packed_kind(module)
        digest.update(f"{name} {kind} ".encode() if kind not in (None, "float") else b"")
    for layer in _adapted(model):
        acting = () if layer.disable_adapters or layer.merged_adapters else tuple(layer.active_adapters)
        scaling = vars(layer).get("scaling", {})
        digest.update(repr([scaling.get(adapter) for adapter in acting]).encode() if acting else b"")
        for name in layer.adapter_layer_names:
            for adapter, part in getattr(layer, name, {}).items():
                if adapter not in acting:
                    idle |= {id(x) for x in (part.parameters() if isinstance(part, nn.Module) else (part,))}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and id(tensor) not in idle:
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
            if not tensor.is_meta:  # what lies on a disk meanwhile is not read
                found = tensor.detach().reshape(-1)[:: _step(tensor.numel(), SAMPLES)][:SAMPLES]
                digest.update(found.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def answers(model: Any) -> list[list[float]]:
    """Return what each projection to keys or values makes of the inputs: `ANSWERS` numbers of each, in order."""
    width = model.config.get_text_config(decoder=True).hidden_size
    places = torch.arange(INPUTS, device=HOST) * width // INPUTS
    found = []
    with torch.autocast(model.device.type, enabled=False):
        for projection in _projections(model):
            answer = _answer(projection, places, width, model).float().reshape(-1)
            chosen = answer[:: _step(answer.numel(), ANSWERS)][:ANSWERS]
            found.append([float(f"{number:.4g}") for number in chosen.tolist()])
    return found


def alike(one: list[list[float]], other: list[list[float]], dtype: torch.dtype) -> bool:
    """Return whether two models of `dtype` gave the same answers, but for the rounding of a sum."""
    tolerance = max(LEAST_TOLERANCE, 2 * torch.finfo(dtype).eps)
    if [len(numbers) for numbers in one] != [len(numbers) for numbers in other]:
        return False
    for a, b in zip(
        *([torch.tensor(x, device=HOST, dtype=torch.float32) for x in found] for found in (one, other)), strict=True
    ):
        if not torch.allclose(a, b, rtol=0.0, atol=tolerance * float(a.abs().max()), equal_nan=True):
            return False
    return True


def _answer(projection: nn.Module, places: Tensor, width: int, model: Any) -> Tensor:
    """Return the outputs [INPUTS, F], or one more dimension, to inputs that are 1 at `places`."""
    if _is_plain(projection):
        weight: Any = projection.weight
        bias: Any = projection.bias
        chosen: Tensor = weight[:, places.to(weight.device)].T
        return chosen if bias is None else chosen + bias
    device = next((x.device for x in projection.parameters() if not x.is_meta), model.device)
    answer: Tensor = projection(nn.functional.one_hot(places, width)[None].to(device, model.dtype))
    return answer


def _is_plain(module: nn.Module) -> bool:
    """Return whether a call of the module would be a product with its weights, and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return type(module) is nn.Linear and not any(hooks) and "forward" not in vars(module) and not module.weight.is_meta


def _step(numbers: int, wanted: int) -> int:
    return max(1, numbers // wanted) | 1  # odd, so that the columns of a matrix are all met


def _projections(model: nn.Module) -> Iterator[nn.Module]:
    for attention in model.modules():
        if "layer_idx" in vars(attention):
            yield from (child for name, child in attention.named_children() if name in PROJECTIONS)


def packed_kind(module: nn.Module) -> str | None:
    """Return what was asked for the weight of this very module (`attnpred.hf.packing`), None where nothing was."""
    kind: str | None = getattr(vars(module).get("forward"), "kind", None)
    return kind


def adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Yield all parts of PEFT's adapters that are modules, and the modules in them."""
    for layer in _adapted(model):
        for name in layer.adapter_layer_names:
            for part in getattr(layer, name, {}).values():
                if isinstance(part, nn.Module):
                    yield from part.modules()


def _adapted(model: nn.Module) -> Iterator[Any]:
    """Yield the layers of PEFT that wrap one of the model's; it is loaded where there are any."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None:
        yield from (module for module in model.modules() if isinstance(module, tuners.BaseTunerLayer))
