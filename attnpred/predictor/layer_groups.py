"""Which layers share the keys of distant tokens: similarity of their attention, and groups made from it.

PoD (arXiv 2412.02252, section 2.1 and algorithm 1): the similarity of two layers for a head is 1 less the Jensen-Shannon
divergence of their attention rows for the same token, averaged over rows and samples; with logarithms to the base 2 it lies
between 0 and 1. Groups are successive layers, made from the bottom up for each head: a layer joins while it is at least
`delta` similar to every layer of the group, and begins a new one otherwise.

Heads are kv heads here, because keys are shared: the similarity of a kv head is the mean over its query heads.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from attnpred.errors import ConfigError, ShapeError
from attnpred.files import write_text
from attnpred.reading import read_json

FORMAT = 1


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Return the divergence [...] in bits of distributions p and q [..., L].

    What they lack to 1 (the share of an attention sink) counts as one more outcome.
    """
    p, q = (torch.cat((x, (1 - x.sum(-1, keepdim=True)).clamp_min(0)), -1) for x in (p.double(), q.double()))
    m = (p + q) / 2
    return ((torch.xlogy(p, p) + torch.xlogy(q, q)) / 2 - torch.xlogy(m, m)).sum(-1).clamp_min(0) / torch.log(
        torch.tensor(2.0, dtype=torch.float64, device="cpu")
    )


def similarities(rows: Tensor, kv_heads: int) -> Tensor:
    """Return 1 - JS of every pair of layers, [Hkv, layers, layers], for attention rows [layers, Hq, T, L]."""
    layers, heads = rows.shape[:2]
    if heads % kv_heads:
        raise ShapeError(f"got {heads} query heads for {kv_heads} kv heads, expected whole groups")
    found = torch.ones(kv_heads, layers, layers, dtype=torch.float32, device="cpu")
    for low in range(layers):
        for high in range(low + 1, layers):
            each = 1 - jensen_shannon(rows[low], rows[high]).mean(-1)  # [Hq]
            found[:, low, high] = found[:, high, low] = each.unflatten(0, (kv_heads, -1)).mean(1).float()
    return found


def group_layers(similarity: Tensor, delta: float) -> list[list[int]]:
    """Return the groups of one head, successive layers each, for the similarities [layers, layers] of its layers."""
    groups: list[list[int]] = []
    for layer in range(similarity.shape[0]):
        if groups and bool((similarity[layer, groups[-1]] >= delta).all()):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


@final
@dataclass(frozen=True, slots=True)
class LayerGroups:
    """What `attnpred analyse-layers` found.

    layers: the model's full-attention layers, in order, as the model numbers them; groups: for each kv head lists of these;
    similarity [Hkv][layers][layers]; fingerprint: of the model's config; rows: attention rows that were compared.
    """

    base_model: str
    fingerprint: str
    query_heads: int
    kv_heads: int
    layers: tuple[int, ...]
    delta: float
    rows: int
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    similarity: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        for name, found in (("kv heads", self.kv_heads), ("query heads", self.query_heads // max(1, self.kv_heads))):
            if found < 1:
                raise ConfigError(f"got {found} {name}, expected at least 1: analyse the layers again")
        if len(self.groups) != self.kv_heads:
            raise ConfigError(
                f"got groups of {len(self.groups)} heads, expected {self.kv_heads}: analyse the layers again"
            )
        for head, groups in enumerate(self.groups):
            if [layer for group in groups for layer in group] != list(self.layers) or not all(groups):
                raise ConfigError(
                    f"got groups {[list(group) for group in groups]} of head {head}, expected every layer once and in "
                    f"order: {list(self.layers)}"
                )

    @property
    def shares(self) -> bool:
        """True where any layer takes keys from another."""
        return any(len(group) > 1 for groups in self.groups for group in groups)

    @property
    def dropped(self) -> float:
        """Share of the distant keys that need not be kept."""
        return 1 - sum(map(len, self.groups)) / max(1, self.kv_heads * len(self.layers))

    def leaders(self) -> dict[int, tuple[int, ...]]:
        """Return for each layer the layer, per kv head, whose distant keys it uses."""
        found = {layer: [layer] * self.kv_heads for layer in self.layers}
        for head, groups in enumerate(self.groups):
            for group in groups:
                for layer in group:
                    found[layer][head] = group[0]
        return {layer: tuple(heads) for layer, heads in found.items()}

    def regrouped(self, delta: float) -> "LayerGroups":
        """Return the groups that another `delta` makes of the same similarities."""
        return grouped(
            torch.tensor(self.similarity, dtype=torch.float32, device="cpu"),
            delta,
            **{name: getattr(self, name) for name in SAID},
        )

    def save(self, path: Path) -> None:
        """Write it as JSON, all of it or nothing. Raises `OutputError`."""
        write_text(path, json.dumps({"attnpred_layer_groups": FORMAT} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "LayerGroups":
        """Read what `save` wrote. Raises `ConfigError`."""
        advice = "expected a file of `attnpred analyse-layers`"
        said: Any = read_json(path, "a file of `attnpred analyse-layers`")
        names = list(cls.__dataclass_fields__)
        if (
            not isinstance(said, dict)
            or said.pop("attnpred_layer_groups", None) != FORMAT
            or sorted(said) != sorted(names)
        ):
            raise ConfigError(f"got {path}, which is none, or of another version, {advice}: analyse the layers again")
        try:
            return cls(**{name: _frozen(value) for name, value in said.items()})
        except (TypeError, AttributeError) as error:  # a word where a list belongs
            raise ConfigError(f"got {path}, {advice}: {error}") from None


SAID = ("base_model", "fingerprint", "query_heads", "kv_heads", "layers", "rows")


def grouped(similarity: Tensor, delta: float, **said: Any) -> LayerGroups:
    """Return the groups that `delta` makes of similarities [Hkv, layers, layers]; said: the fields of `SAID`."""
    if not 0 <= delta <= 1:
        raise ConfigError(f"got delta={delta!r}, expected a similarity from 0 to 1")
    layers: Sequence[int] = said["layers"]
    groups = [[[layers[i] for i in group] for group in group_layers(head, delta)] for head in similarity]
    rounded = [[[round(x, 6) for x in row] for row in head] for head in similarity.tolist()]
    return LayerGroups(delta=delta, groups=_frozen(groups), similarity=_frozen(rounded), **said)


def mean_similarity(samples: Iterable[Tensor]) -> Tensor:
    """Return the mean of similarities [Hkv, layers, layers] of samples with equally many rows."""
    return torch.stack(list(samples)).mean(0)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
