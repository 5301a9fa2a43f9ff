"""What the tests of the transformers integration share: settings, greedy generation, a tokenizer, a predictor."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attnpred.config import CacheConfig
from attnpred.hf import cache_argument
from attnpred.hf.argument import take_cache
from attnpred.policies import POLICIES, FastGen, SepLLM
from attnpred.policies.base import Policy
from attnpred.predictor.pretrained import Predictor, PredictorConfig

SMALL = CacheConfig(budget=64, block_size=4, num_sink_tokens=8, recent_window=8, history=8, dense_layers=0)
"""Below the contexts of these tests: 16 blocks of 4 tokens, of which 2 are sinks and 3 recent at most."""

WHOLE = replace(SMALL, budget=1.0)
"""Everything fits, so every step is dense."""

COVERING = replace(SMALL, budget=100_000, dense_when_fits=False)
"""Everything fits, and every step takes the sparse path all the same, over all blocks."""


def offloaded(settings: CacheConfig, offload: str | None, folder: Path) -> CacheConfig:
    """Return `settings` for a cache whose blocks lie there; those of "disk" in `folder`."""
    return replace(settings, offload=offload, offload_dir=folder if offload == "disk" else None)


def greedy(model: PreTrainedModel, tokens: Tensor, new: int = 24, **settings: Any) -> Tensor:
    """Return prompt and `new` tokens, [B, L + new]; `tokens` [B, L] are not padded unless an attention_mask says so."""
    settings.setdefault("attention_mask", torch.ones_like(tokens))
    cache = take_cache(settings)
    if cache is not None:
        settings |= cache_argument(cache)
    return model.generate(tokens, do_sample=False, max_new_tokens=new, **settings)  # type: ignore[no-any-return]


def greedy_logits(model: PreTrainedModel, tokens: Tensor, new: int = 24, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens of `greedy` and the logits [new, B, V] they were taken from."""
    out: Any = greedy(model, tokens, new, return_dict_in_generate=True, output_logits=True, **settings)
    return out.sequences, torch.stack(out.logits)


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask [B, L] of rows [1, any length]."""
    length = max(row.shape[1] for row in rows)
    pad = [(length - row.shape[1], 0) for row in rows]
    tokens = torch.cat([torch.nn.functional.pad(row, sides) for row, sides in zip(rows, pad, strict=True)])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(row), sides) for row, sides in zip(rows, pad, strict=True)]
    )
    return tokens, mask


def separators(policy: str) -> Policy[Any] | str:
    """Return `policy`; for those that need a tokenizer, which the models here have not, with ids of their own.

    One that has weights gets those that `predictor` returns.
    """
    if policy in POLICIES and POLICIES[policy].predictor_kind:
        made: Any = POLICIES[policy]
        return made(predictor(made.predictor_kind))
    if policy == "fastgen":  # such that heads of a random model choose differently
        return FastGen((1, 2), tuple(range(3, 9)), mass=0.6, frequent=0.05, local=0.1)
    return SepLLM(tuple(range(3, 20)), most=12, neighbours=24) if policy == "sepllm" else policy


@cache
def predictor(kind: str) -> Predictor:
    """Return a predictor that was never trained, for the blocks of `SMALL`, and if it is a gate, these models."""
    torch.manual_seed(0)
    sizes = {"group": 2, "head_dim": 8, "rank": 8} if kind == "seer-gate" else {}
    return Predictor(PredictorConfig(kind, SMALL.block_size, **sizes)).eval()


WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 97))]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 97 `WORDS`, which stand apart."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def text_of(tokens: Tensor) -> str:
    """Return the words of `tokens` [L], from which `tokenizer` makes the same tokens."""
    return " ".join(WORDS[int(token)] for token in tokens)
