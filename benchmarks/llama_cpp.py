"""llama.cpp as a rival, by the package xllamacpp (extra `rivals`): the same weights, in files of its own, and its own clock.

Both files are made once from the one that was fetched, in the user's cache folder. Q4_1 has its tensors as they are; in Q8_0
each matrix is unpacked and rounded again. Both say that the model was trained for more tokens than it was, because llama.cpp
refuses longer contexts, whose speed is measured too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnpred.errors import missing_extra
from attnpred.hf.fetch import fetch_gguf
from attnpred.hf.once import once

CONTEXT = 1 << 16
WEIGHTS = {"Q4_1": None, "Q8_0": "Q8_0"}
"""What matrices are rounded to again; None: as they are."""
KV = {"f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0"}


def gguf_of(model: str, weights: str) -> Path:
    """Return the file of a named model in those weights, made if it is not there."""
    source = fetch_gguf(model)

    def make(work: Path) -> Path:
        return _rewritten(source, work / "rival.gguf", WEIGHTS[weights])

    return once(source.parent / "rivals" / f"{source.stem}-{weights}.gguf", make)


def _rewritten(source: Path, target: Path, weights: str | None) -> Path:
    """Write the tensors of `source` to `target`, matrices in other numbers if `weights` says so."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants

    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    changed: dict[str, Any] = {f"{architecture}.context_length": CONTEXT}
    if weights is not None:
        changed["general.file_type"] = int(LlamaFileType[f"MOSTLY_{weights}"])
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        parts = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, changed.get(name, field.contents()), kind, parts)
    for tensor in reader.tensors:
        if weights is None or len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            kind = GGMLQuantizationType[weights]
            numbers = quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


class LlamaCpp:
    """A server in this process, with room for one text; it keeps what it has read."""

    def __init__(self, model: str, weights: str, kv: str, context: int, threads: int) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise missing_extra("xllamacpp", "rivals") from None
        given = xllamacpp.CommonParams()
        given.model.path = str(gguf_of(model, weights))
        given.n_ctx, given.n_parallel, given.warmup, given.verbosity = -(-context // 256) * 256, 1, True, 0
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
        given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type[KV[kv]]
        given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.server = xllamacpp.Server(given)

    def read(self, ids: Sequence[int]) -> float:
        """Read a prompt; return milliseconds."""
        return float(self._complete(ids, 1, cached=False)["prompt_ms"])

    def decode(self, ids: Sequence[int], steps: int) -> float:
        """Generate after a prompt that was read; return milliseconds per token."""
        found = self._complete(ids, steps, cached=True)
        assert found["prompt_n"] == 1 and found["predicted_n"] == steps, found
        return float(found["predicted_per_token_ms"])

    def likeliest(self, ids: Sequence[int]) -> int:
        """Return the likeliest next token."""
        wanted = {"prompt": list(ids), "n_predict": 1, "n_probs": 1, "temperature": 0, "post_sampling_probs": False}
        return int(self.server.handle_completions(wanted)["choices"][0]["logprobs"]["content"][0]["id"])

    def _complete(self, ids: Sequence[int], steps: int, *, cached: bool) -> dict[str, Any]:
        wanted = {"prompt": list(ids), "n_predict": steps, "temperature": 0, "ignore_eos": True, "cache_prompt": cached}
        timings: dict[str, Any] = self.server.handle_completions(wanted)["timings"]
        return timings
