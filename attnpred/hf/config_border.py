"""A model's config.json before transformers acts on it: sizes are whole numbers within reason.

A config may come from anyone, and transformers makes a list of as many layers as it names: 10^11 of them would fill the
memory before anything could be refused. Bounds are several times those of the largest models there are.
"""

from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from attnpred import checks
from attnpred.errors import UnsupportedModelError
from attnpred.reading import read_json

CONFIG = "config.json"
LAYERS, HEADS, WIDTH = (0, 1000), (1, 4096), (1, 1 << 18)
BOUNDS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("num_global_key_value_heads", "multi_query_group_num"), HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), WIDTH),
    **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim", "kv_channels"), (1, 1 << 13)),
    "vocab_size": (1, 1 << 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length"), (1, checks.WHOLE)),
    "sliding_window": (0, checks.WHOLE),
}
"""Least and most of a size, by the names that families give it."""


def check_config(source: str) -> None:
    """Raise `UnsupportedModelError` unless the config of `source`, a folder or Hub id, is one that can be acted on.

    What has no config is left to transformers. Raises `OSError` where the Hub cannot be reached.
    """
    found = (
        Path(source, CONFIG)
        if Path(source).is_dir()
        else cached_file(source, CONFIG, _raise_exceptions_for_missing_entries=False)
    )
    if found is None or not (place := Path(found)).exists():
        return
    values = read_json(place, "the config of a model", UnsupportedModelError)
    if not isinstance(values, dict):
        raise UnsupportedModelError(f"got {place} with {checks.shown(values)}, expected an object")
    check_values(values, place)


def check_values(values: dict[str, Any], place: Path) -> None:
    """Raise `UnsupportedModelError` unless every number of a config that was read from `place` can be acted on."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_values(value, place)
        elif name in BOUNDS and value is not None:
            for number in value if isinstance(value, list) else [value]:  # a list has one for each layer
                try:
                    checks.whole(name, number, *BOUNDS[name], error=UnsupportedModelError)
                except UnsupportedModelError as error:
                    raise UnsupportedModelError(f"{place}: {error}") from None
