"""`attnpred info policies`: what every policy is, from its class; what it remembers, from its own memory.

State is measured, because it is in no table: a memory of a reference layer is fed two contexts, and the difference is what
a token costs (`attnpred.hf.sizes`). It is for one kv head of 128 dimensions in 16 bits and four query heads, with blocks of
16 tokens; a key and its value take 512 bytes there.
"""

from typing import Any

from attnpred.cli.tables import drawn

CONTEXTS = (1 << 15, 1 << 16)
KV_HEADS, DIM, GROUP = 8, 128, 4
COLUMNS = {
    "policy": "policy",
    "kind": "kind",
    "state_bytes_per_token": "bytes/token",
    "needs_query": "query",
    "prefetchable": "prefetch",
    "source": "source",
    "cost": "cost of a selection, per kv head",
}


def collect() -> dict[str, dict[str, Any]]:
    """Return the rows of the table by the name of the policy, ready for JSON."""
    from attnpred.policies import POLICIES

    return {name: describe(name) for name in POLICIES}


def describe(name: str) -> dict[str, Any]:
    """Return the row of one policy."""
    import torch

    from attnpred.config import CacheConfig
    from attnpred.hf.sizes import memory_bytes
    from attnpred.policies import POLICIES
    from attnpred.store.estimate import LayerShape

    kind = POLICIES[name]
    settings = CacheConfig(block_size=kind.granularity)
    state = 0.0
    if not kind.is_dense:
        policy = kind.untrained(settings.block_size, GROUP, DIM)
        layer = LayerShape(KV_HEADS, DIM, DIM, torch.bfloat16.itemsize, GROUP)
        small, large = (memory_bytes(settings, policy, 0, layer, torch.bfloat16, tokens) for tokens in CONTEXTS)
        state = (large - small) / (CONTEXTS[1] - CONTEXTS[0]) / KV_HEADS
    return {
        "about": (kind.__doc__ or "").strip().partition("\n")[0],
        "kind": kind.kind,
        "state_bytes_per_token": round(state, 3),
        "cost": kind.cost,
        "needs_query": kind.needs_query or kind.corrects,
        "prefetchable": not (kind.needs_query or kind.is_dense or kind.evicts),
        "source": kind.source,
    }


def text(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table as people read it."""
    lines = []
    for name, row in rows.items():
        cells = {"policy": name} | {key: _cell(value) for key, value in row.items()}
        lines.append([cells[key] for key in COLUMNS])
    said = "bytes/token: what is remembered for each token and kv head, beside 512 for a key and its value"
    return f"{drawn(list(COLUMNS.values()), lines)}\n{said}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
