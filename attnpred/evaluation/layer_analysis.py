"""Run a model over texts and group its layers by how similar their attention is (`attnpred.predictor.layer_groups`).

The rows that are compared are those of the last `rows` tokens of each sample, token by token and query head by query head,
with the model's own softcap and attention sinks; one dense pass per sample, nothing is decoded.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from attnpred import hf
from attnpred.capture import captured, documents
from attnpred.errors import ConfigError
from attnpred.predictor.layer_groups import SAID, LayerGroups, grouped, mean_similarity, similarities
from attnpred.reading import read_text


def analyse_layers(
    model: Any,
    tokenizer: Any,
    files: Sequence[Path],
    *,
    base_model: str,
    delta: float = 0.5,
    tokens: int = 2048,
    rows: int = 64,
    per_file: int = 4,
) -> LayerGroups:
    """Return groups of the layers of `model`; samples are up to `per_file` pieces of `tokens` tokens of each file."""
    if not 1 <= rows <= tokens:
        raise ConfigError(f"got rows={rows}, expected 1 to tokens={tokens}: compare at most every row of a sample")
    if not 0 <= delta <= 1:
        raise ConfigError(f"got delta={delta!r}, expected a similarity from 0 to 1")
    samples = [
        ids
        for file in sorted(files)
        for _, ids in islice(documents(file.stem, read_text(file), tokenizer, tokens), per_file)
    ]
    if not samples:
        raise ConfigError(
            f"got no text of at least {tokens} tokens, expected one: give longer files, or lower --tokens"
        )
    found, said = [], {}
    for ids in tqdm(samples, desc="layers", unit="sample"):
        seen = captured(model, ids.to(model.device), rows, 1, per_query_head=True)
        query_heads, kv_heads = seen.rows.shape[1], seen.keys.shape[1]
        found.append(similarities(seen.rows, kv_heads).cpu())
        values = (base_model, hf.fingerprint(model.config), query_heads, kv_heads, seen.layer_ids, rows * len(samples))
        said = dict(zip(SAID, values, strict=True))
    return grouped(mean_similarity(found), delta, **said)
