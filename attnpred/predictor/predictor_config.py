"""`PredictorConfig`: what a predictor is and what it was trained for; the `config.json` beside its weights.

Networks come from the explicit table `NETWORKS`; a new one is one file and one line here.
"""

import dataclasses
import json
import re
from collections.abc import Callable

from torch import nn

from attnpred import checks
from attnpred.errors import PredictorError
from attnpred.predictor.cnn import PaperCNN, UnpaddedCNN
from attnpred.predictor.seer_gate import SeerGate
from attnpred.reading import parse_json

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT = 1
MOST_HEADS = 4096
MOST = {"block_size": 1 << 16, "history": checks.TOKENS, "head_dim": 1 << 16, "rank": 1 << 16}
"""Bounds of the whole numbers of a config; of all others, `MOST_HEADS`."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""owner/name, as the Hub takes them."""


@dataclasses.dataclass(frozen=True, slots=True)
class PredictorConfig:
    """What a predictor is and what it was trained for.

    kind: a name in `NETWORKS`. block_size: P of the rows it was trained on. history: H, likewise (it accepts any).
    base_model: the human name of the model. fingerprint: identifies that model's architecture, see `attnpred.capture`.
    trained_on: the data, in words. format: version of the files.
    Of a gate: layers, the model's layers it has weights for, as "0 1 2"; heads: kv heads; head_dim: D; group: query heads of
    a kv head, G; rank: r of its gate vectors.
    """

    kind: str = "cnn"
    block_size: int = 16
    history: int = 64
    base_model: str = ""
    fingerprint: str = ""
    trained_on: str = ""
    layers: str = ""
    heads: int = 1
    head_dim: int = 1
    rank: int = 1
    group: int = 1
    format: int = FORMAT

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                checks.whole(field.name, value, 1, MOST.get(field.name, MOST_HEADS), error=PredictorError)
            elif type(value) is not str:
                raise PredictorError(f"got {field.name}={checks.shown(value)}, expected a text: correct the config")
        if self.format != FORMAT:
            raise PredictorError(
                f"got format={self.format}, expected {FORMAT}: update attnpred, or train the predictor again"
            )
        if self.kind not in NETWORKS:
            raise PredictorError(
                f"got kind={self.kind!r}, expected one of {sorted(NETWORKS)}: update attnpred, or correct it"
            )
        if not re.fullmatch(r"(\d{1,4}( \d{1,4})*)?", self.layers) or len(set(self.layer_ids)) != len(self.layer_ids):
            raise PredictorError(
                f"got layers={checks.shown(self.layers)}, expected different layer numbers, as in '0 1 2'"
            )

    @property
    def layer_ids(self) -> list[int]:
        """The model's layers that there are weights for; empty where all layers share one set."""
        return [int(layer) for layer in self.layers.split()]

    def to_json(self) -> str:
        """Return the config as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = CONFIG) -> "PredictorConfig":
        """Return the config written in `text`; `source` is named in errors."""
        values = parse_json(text, source, "a config: save it again", PredictorError)
        if not isinstance(values, dict):
            raise PredictorError(f"got {source} with a {type(values).__name__}, expected an object: save it again")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise PredictorError(
                f"got {source} with unknown keys {unknown}, expected {known}: update attnpred, or remove them"
            )
        try:
            return cls(**values)
        except PredictorError as error:
            raise PredictorError(f"{source}: {error}") from None


NETWORKS: dict[str, Callable[[PredictorConfig], nn.Module]] = {
    "cnn": lambda config: PaperCNN(),
    "cnn-unpadded": lambda config: UnpaddedCNN(),
    "seer-gate": lambda config: SeerGate(
        max(1, len(config.layer_ids)), config.heads, config.group, config.head_dim, config.rank
    ),
}
