"""The demo LM for training: the Qwen2 architecture as one function of a dictionary of tensors.

Parameter names are those of `transformers.Qwen2ForCausalLM`, so export is a rename of nothing; `export.py` checks that
both give the same logits. Written out because on a CPU the library's module costs 1.3 to 1.8 times as long at 1K to 4K
tokens (grouped SDPA is slow there), and because weighted losses want the logits of one call.

Start: normal(0.02), output projections scaled down by depth, and one circuit laid in by hand, because finding it is the
slow part of learning to retrieve: "copy what followed the earlier occurrence of these three tokens".
* Residual dims 0-127 carry the embedding at first; `code` (32 x 128) is a random projection of it.
* Layer 0, heads 0-2, look 1, 2 and 3 tokens back (by query and key biases alone) and write the code of that token into
  dims 128-159, 160-191, 192-223.
* Layer 1, head 0, compares the codes of the last three tokens with the codes of the three before each position, in the
  32 dims that rotate slowest, and adds the embedding found there to the residual.
Training is free to change all of it. The figures are those of the default `Shape`; other shapes take half of the hidden
size for the embedding and half of a head for a code, and must have room for three codes beside the embedding.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; `rope_theta` is large so that half of each head hardly rotates within 8K tokens."""

    vocab: int = 4096
    hidden: int = 256
    ffn: int = 768
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    max_positions: int = 8192
    rope_theta: float = 1e8

    def __post_init__(self) -> None:
        room, codes = self.hidden - self.hidden // 2, 3 * (self.head_dim // 2)
        if self.heads < 3 or self.layers < 2 or codes > room or self.head_dim % 16 or self.heads % self.kv_heads:
            raise ValueError(
                f"got {self}, expected 3 heads or more in whole groups, 2 layers or more, a head dim that 16 divides, and "
                "3 / 2 of it to be at most half of the hidden size: the circuit that is laid in needs them"
            )


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Give the parser one option per field of `Shape`, so that training and export of one model take the same ones."""
    for field in fields(Shape):
        default = field.default
        parser.add_argument("--" + field.name.replace("_", "-"), type=type(default), default=default)


def shape_of(args: argparse.Namespace) -> Shape:
    return Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})


def init(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Return fresh fp32 parameters, the output head tied to the embedding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, scale: float = 0.02) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * scale

    s, out = shape, 0.02 / (2 * shape.layers) ** 0.5
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    params = {"model.embed_tokens.weight": normal(s.vocab, s.hidden), "model.norm.weight": torch.ones(s.hidden)}
    for i in range(s.layers):
        p = f"model.layers.{i}."
        params |= {
            p + "input_layernorm.weight": torch.ones(s.hidden),
            p + "self_attn.q_proj.weight": normal(q, s.hidden),
            p + "self_attn.k_proj.weight": normal(kv, s.hidden),
            p + "self_attn.v_proj.weight": normal(kv, s.hidden),
            p + "self_attn.q_proj.bias": torch.zeros(q),
            p + "self_attn.k_proj.bias": torch.zeros(kv),
            p + "self_attn.v_proj.bias": torch.zeros(kv),
            p + "self_attn.o_proj.weight": normal(s.hidden, q, out),
            p + "post_attention_layernorm.weight": torch.ones(s.hidden),
            p + "mlp.gate_proj.weight": normal(s.ffn, s.hidden),
            p + "mlp.up_proj.weight": normal(s.ffn, s.hidden),
            p + "mlp.down_proj.weight": normal(s.hidden, s.ffn, out),
        }
    _lay_in_induction(params, shape, generator)
    return {name: value.requires_grad_() for name, value in params.items()}


def _lay_in_induction(params: dict[str, Tensor], shape: Shape, generator: torch.Generator) -> None:
    """Write the circuit of the module docstring into the first two layers (see there)."""
    half, code_dims, own = shape.head_dim // 2, shape.head_dim // 2, shape.hidden // 2
    fast = shape.head_dim // 8 + 1  # of a head's rotations, those that tell tokens a few places apart

    def orthonormal(rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].T

    embedding = params["model.embed_tokens.weight"]
    embedding[:, :own] *= 1.35
    embedding[:, own:] *= 0.2
    rms = float(embedding.pow(2).mean().sqrt())
    code, copied = orthonormal(code_dims, own), orthonormal(shape.head_dim, own)
    turns = [torch.eye(code_dims), orthonormal(code_dims, code_dims), orthonormal(code_dims, code_dims)]

    def view(name: str, heads: int) -> Tensor:
        return params[name].view(heads, shape.head_dim, -1)

    first = "model.layers.0.self_attn."
    angles = inverse_frequencies(shape)[:fast]
    q_bias, k_bias = params[first + "q_proj.bias"].view(-1, 2, half), params[first + "k_proj.bias"].view(-1, 2, half)
    k_bias[:, 0, :fast] = 6.0
    view(first + "v_proj.weight", shape.kv_heads)[:, :code_dims] = 0.0
    view(first + "v_proj.weight", shape.kv_heads)[:, :code_dims, :own] = code
    params[first + "o_proj.weight"].view(-1, shape.heads, shape.head_dim)[:, :, :code_dims] = 0.0
    for back in (1, 2, 3):
        q_bias[back - 1, 0, :fast] = 6.0 * torch.cos(angles * back)
        q_bias[back - 1, 1, :fast] = -6.0 * torch.sin(angles * back)
        block = slice(own + code_dims * (back - 1), own + code_dims * back)
        params[first + "o_proj.weight"][
            block, shape.head_dim * (back - 1) : shape.head_dim * (back - 1) + code_dims
        ] = rms * torch.eye(code_dims)

    second = "model.layers.1.self_attn."
    slow = torch.cat((torch.arange(half // 2, half), torch.arange(half + half // 2, 2 * half)))
    q, k = view(second + "q_proj.weight", shape.heads)[0], view(second + "k_proj.weight", shape.kv_heads)[0]
    for i, turn in enumerate(turns):
        before = slice(own + code_dims * i, own + code_dims * (i + 1))
        current = slice(0, own) if i == 0 else slice(own + code_dims * (i - 1), own + code_dims * i)
        q[slow, current] += 1.3 * (turn @ code if i == 0 else turn)
        k[slow, before] += 1.3 * turn
    view(second + "v_proj.weight", shape.kv_heads)[0] = 0.0
    view(second + "v_proj.weight", shape.kv_heads)[0, :, :own] = copied
    params[second + "o_proj.weight"][:, : shape.head_dim] = 0.0
    params[second + "o_proj.weight"][:own, : shape.head_dim] = 0.075 * copied.T


def inverse_frequencies(shape: Shape) -> Tensor:
    return shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def logits(
    params: dict[str, Tensor],
    shape: Shape,
    tokens: Tensor,
    positions: Tensor,
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return bf16 logits [B, L, vocab] for `tokens` and float `positions`, both [B, L].

    attend: another attention than the causal one, of layer i and its q, k, v [B, heads, L, head_dim].
    """
    batch, length = tokens.shape
    heads, kv_heads, group = shape.heads, shape.kv_heads, shape.heads // shape.kv_heads
    angle = positions[:, None, :, None] * inverse_frequencies(shape)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (shape.hidden,), params[name], 1e-6).bfloat16()

    def fused(prefix: str, *names: str) -> Tensor:
        return torch.cat([params[prefix + name] for name in names]).bfloat16()

    x = F.embedding(tokens, params["model.embed_tokens.weight"])
    for i in range(shape.layers):
        p, a = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        y = norm(x, p + "input_layernorm.weight")
        weight = fused(a, "q_proj.weight", "k_proj.weight", "v_proj.weight")
        bias = fused(a, "q_proj.bias", "k_proj.bias", "v_proj.bias")
        qkv = F.linear(y, weight, bias).view(batch, length, heads + 2 * kv_heads, shape.head_dim).transpose(1, 2)
        qk = _rotate(qkv[:, : heads + kv_heads], cos, sin)
        q, k = qk[:, :heads], qk[:, heads:].repeat_interleave(group, 1)
        v = qkv[:, heads + kv_heads :].repeat_interleave(group, 1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True) if attend is None else attend(i, q, k, v)
        o = o.transpose(1, 2).reshape(batch, length, -1)
        x = x + F.linear(o, params[a + "o_proj.weight"].bfloat16())
        y = norm(x, p + "post_attention_layernorm.weight")
        gate, up = F.linear(y, fused(p, "mlp.gate_proj.weight", "mlp.up_proj.weight")).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, params[p + "mlp.down_proj.weight"].bfloat16())
    return F.linear(norm(x, "model.norm.weight"), params["model.embed_tokens.weight"].bfloat16())
