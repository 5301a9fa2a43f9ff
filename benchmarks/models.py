"""Models of known shapes with random weights, and caches filled with random keys and values.

Speed depends on shapes, not on what a model knows, so no weights are needed: "1b" is the Llama-3.2-1B shape, "8b" that of
Llama-3.1-8B, both with a small vocabulary, and with fewer layers where a benchmark says so. "demo" is the embedded LM
itself. What does depend on the numbers (churn, recovery) is measured on real text, elsewhere.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from attnpred.hf import TieredCache
from attnpred.kernels.dense import AttentionTerms

SHAPE_1B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=1 << 20,
    tie_word_embeddings=True,
)
SHAPE_8B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=1 << 20,
    tie_word_embeddings=True,
)
TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1 << 20,
    tie_word_embeddings=True,
)
SHAPES = {"1b": SHAPE_1B, "8b": SHAPE_8B, "tiny": TINY}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SEED_QUERIES = 64
"""Last queries of the prompt, which seed a memory."""


def random_model(layers: int | None = None, *, shape: str = "1b", dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a model of that shape with random weights; `layers` in place of the shape's own."""
    torch.manual_seed(0)
    config = copy.deepcopy(SHAPES[shape])
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    model: Any = empty.to(dtype).to_empty(device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is not among the parameters
    return model


def row_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of one token."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


@torch.no_grad()
def fill(
    caches: Sequence[Cache],
    config: Any,
    context: int,
    dtype: torch.dtype = torch.bfloat16,
    padding: Tensor | None = None,
) -> None:
    """Fill all `caches` with the same random keys and values; memories see the keys, and rows of random queries.

    padding [B]: how many tokens each row has too many on its left; None is one row without.
    """
    generator = torch.Generator().manual_seed(0)
    batch = 1 if padding is None else len(padding)
    recent = min(SEED_QUERIES, context)
    mask = None
    if padding is not None:
        places = torch.arange(context)
        mask = (places >= padding[:, None])[:, None] & (places <= places[-recent:, None])
    for layer in range(config.num_hidden_layers):
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        shape = (batch, config.num_attention_heads, recent, config.head_dim)
        queries = torch.randn(shape, generator=generator).to(dtype)
        for cache in caches:
            cache.update(keys, values, layer)
            if isinstance(cache, TieredCache):
                held: Any = cache.layers[layer]
                terms = AttentionTerms(config.head_dim**-0.5)
                cache.decoder(layer).observe(queries, held.store, terms, mask, prompt=True, keys=keys)
