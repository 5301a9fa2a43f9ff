"""Tiny random models of every family the library promises, built from a config: no download, seeded, in fp32."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"sliding_window": None},
    "gemma2": {"sliding_window": 24, "layer_types": MIXED, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 24, "layer_types": MIXED, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "sliding_window": 24,
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97,
    },
    "gpt_oss": {"sliding_window": 24, "layer_types": MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "cohere2": {"sliding_window": 24, "layer_types": MIXED},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "stablelm": {},
    "biogpt": {"num_key_value_heads": None, "head_dim": None},
    "qwen3_next": LINEAR
    | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "bamba": {
        "attn_layer_indices": [1, 2],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
    | {"mamba_d_state": 8, "mamba_dt_rank": 4},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8}
    | {"ssm_state_size": 8, "n_groups": 1},
}


@cache
def tiny_model(family: str) -> PreTrainedModel:
    """Return a random model of `family` in evaluation mode; the same object for every caller."""
    settings = {k: v for k, v in (BASE | FAMILIES[family]).items() if v is not None or k == "sliding_window"}
    torch.manual_seed(sum(map(ord, family)))
    config = AutoConfig.for_model(family.partition("-")[0], **settings)
    # Older transformers run gemma2 on SDPA by default, which drops its softcap without a word; eager has it.
    how = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                # Sharper than the default start, so that attention and next tokens are not all alike.
                parameter.mul_(4.0)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids [batch, length], none of them special."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
