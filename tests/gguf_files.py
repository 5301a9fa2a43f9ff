"""Tiny GGUF files of random models, written by llama.cpp's own package, and wheels that hold them."""

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import tiny_model

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = ["<unk>", "<s>", "</s>"]
MERGED = ["ab", "AB"]
"""Two at least: transformers 5.16 takes a list of one for no list."""


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return q or k rows in the order that files of the Llama architecture have: pairs that rotate together lie together."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, kind: gguf.GGMLQuantizationType | None = None, layers: int | None = None) -> PreTrainedModel:
    """Write the tiny Llama, its matrices in blocks of `kind` if that is given; return it as it was.

    layers: as many are named in the header, whatever there are.
    """
    model = tiny_model("llama")
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers if layers is None else layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    characters = [chr(code) for code in range(33, 33 + config.vocab_size - len(SPECIAL) - len(MERGED))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*SPECIAL, *characters, *MERGED])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(characters) + len(MERGED)))
    writer.add_token_merges([" ".join(pair) for pair in MERGED])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{own}": f"model.layers.{i}.{theirs}" for own, theirs in LAYER_NAMES.items()}
    for own, theirs in names.items():
        weight = state[f"{theirs}.weight"]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(own.rpartition(".")[2])
        array = np.ascontiguousarray((_interleaved(weight, heads) if heads else weight).numpy().astype(np.float32))
        if kind is None or array.ndim < 2 or array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(f"{own}.weight", array)
        else:
            writer.add_tensor(f"{own}.weight", gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_wheel(folder: Path, package: str, version: str, member: str, content: bytes) -> Path:
    """Write a wheel that holds `content` as its file `member`."""
    name = package.replace("-", "_")
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in [*files.items(), (f"{info}/RECORD", record.encode())]:
            archive.writestr(file, data)
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits of a call."""
    with torch.no_grad():
        return model(ids).logits
