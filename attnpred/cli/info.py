"""`attnpred info`: what is installed and what there is to choose from; with `--model`, what that model's cache takes.

The second needs the model's config alone, so it can be asked before anything large is downloaded. `attnpred info policies`
is a table of its own (`attnpred.cli.policy_table`).
"""

import json
import platform
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from attnpred import checks
from attnpred.cli import policy_table
from attnpred.cli.options import DtypeOption, cache_options, option_name
from attnpred.config import CacheConfig

USUAL = CacheConfig(offload="disk")
"""What the sizes of a cache are told for, unless told otherwise: a slow tier is why one asks."""

PACKAGES = ("attnpred", "torch", "transformers")

KERNELS = {
    "reference": "plain torch in fp32, which the others are checked against",
    "torch": "torch's own operations, on any device",
    "numba": "compiled for this CPU at first use (extra `fast`)",
    "triton": "compiled for a CUDA GPU at first use",
}
SLOW_TIERS = {
    "cpu": "host memory holds the blocks that the budget does not (--offload cpu)",
    "disk": "a file holds them, gone with the cache (--offload disk); host memory first with --host-limit",
}
DEFAULT_CONTEXT = 32768
"""Tokens, for a model that does not say how many it was made for."""


@cache_options(defaults={"offload": USUAL.offload})
def info(
    config: CacheConfig,
    topic: Annotated[
        str | None, typer.Argument(help="`policies`: kind, state, cost and source of each; left out: an overview.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Show instead what its KV cache takes: a Hub id, a local folder, a GGUF file, or a name of `attnpred models`."
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of that cache; left out: the most that the model was made for.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Which policy chooses; left out: predicted.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of the batch; left out: 1.")] = None,
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show versions, devices, policies, kernels; or what a model's KV cache takes."""
    from attnpred.errors import ConfigError

    options: dict[str, Any] = {"context": context, "policy": policy, "batch": batch}
    options["dtype"] = None if dtype == "auto" else dtype
    given = {name: value for name, value in options.items() if value is not None}
    changed = [*given, *(one.name for one in fields(config) if getattr(config, one.name) != getattr(USUAL, one.name))]
    if topic is not None:
        if topic != "policies" or model is not None or changed:
            got = "policies with other options" if topic == "policies" else repr(topic)
            raise ConfigError(f"got {got}, expected `policies` alone, or options alone (see attnpred info --help)")
        rows = policy_table.collect()
        print(json.dumps({"policies": rows}) if as_json else policy_table.text(rows))
        return
    if model is None and changed:
        raise ConfigError(
            f"got {option_name(changed[0])} without --model, expected the model whose cache it is about: add --model"
        )
    facts = collect() if model is None else measure(model, config, **given)
    print(json.dumps(facts) if as_json else _text(facts if model is None else _sizes(facts)))


def measure(
    model: str,
    settings: CacheConfig,
    context: int | None = None,
    policy: str = "predicted",
    batch: int = 1,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Return what the cache of `model` takes with these settings, ready for JSON."""
    from attnpred.errors import UnsupportedModelError
    from attnpred.hf import make_policy
    from attnpred.hf.load import load_config
    from attnpred.hf.sizes import estimate_for

    for name, value in (("context", context), ("batch", batch)):
        if value is not None:
            checks.whole(name, value, 1, checks.TOKENS)
    config, chosen = load_config(model, dtype=dtype)
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = context or longest or DEFAULT_CONTEXT
    found = estimate_for(config, settings, make_policy(policy, None, config, settings), chosen.dtype, tokens, batch)
    if not found.full:
        raise UnsupportedModelError(
            f"got {model}, which has no full-attention layer, expected one that has: there is nothing to compress"
        )
    return {
        "model": model,
        "dtype": str(chosen.dtype).removeprefix("torch."),
        "dtype_why": chosen.why,
        "context": tokens,
        "batch": batch,
        "policy": policy,
        "budget": settings.budget,
        "dense_layers": settings.dense_layers,
        "offload": settings.offload,
        "offload_dtype": settings.offload_dtype,
        "bytes": found.as_dict(),
        "times_less": found.full / found.fast,
    }


def _sizes(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    from attnpred.store.estimate import readable

    names = {
        "full": "full cache",
        "fast": "fast memory",
        "pool": "- pool",
        "memory": "- digests",
        "tables": "- tables",
        "buffers": "- buffers",
        "host": "host memory",
        "disk": "disk",
    }
    rows = {name: readable(found["bytes"][key]) for key, name in names.items()}
    rows["fast memory"] += f", {found['times_less']:.1f} times less than the full cache"
    return {
        f"{found['model']}, {found['context']} tokens, batch {found['batch']}": {
            "dtype": f"{found['dtype']}: {found['dtype_why']}",
            "policy": f"{found['policy']}, budget {found['budget']}, dense layers {found['dense_layers']}",
            "offload": f"{found['offload'] or 'none'}, {found['offload_dtype'] or 'numbers as they are'}",
        },
        "bytes": rows,
    }


def collect() -> dict[str, Any]:
    """Return what the command shows, ready for JSON."""
    from attnpred.evaluation.tasks import TASKS
    from attnpred.hf.dtype import auto_dtype
    from attnpred.kernels import DECODE_BACKENDS, DIGEST, DIGEST_BACKENDS
    from attnpred.policies import POLICIES

    return {
        "versions": {"python": platform.python_version(), **{name: _installed(name) for name in PACKAGES}},
        "devices": _devices(),
        "dtype": {"auto": auto_dtype()},
        "policies": {name: _first_line(policy) for name, policy in POLICIES.items()},
        "kernels": {
            name: KERNELS[name] + (" (in use)" if name == DIGEST else "")
            for name in dict.fromkeys((*DECODE_BACKENDS, *DIGEST_BACKENDS))
        },
        "tiers": SLOW_TIERS,
        "tasks": {name: _first_line(type(make())) for name, make in TASKS.items()},
        "predictors": _predictors(),
    }


def _predictors() -> dict[str, str]:
    from attnpred.predictor.pretrained import Predictor, shipped

    found = {name: Predictor.from_pretrained(folder).config for name, folder in shipped().items()}
    return {name: f"trained on {config.base_model or 'no model in particular'}" for name, config in found.items()}


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _text(facts: dict[str, dict[str, str]]) -> str:
    width = max(len(name) for table in facts.values() for name in table)
    lines: list[str] = []
    for title, table in facts.items():
        rows = table or {"none": ""}
        lines += [title, *(f"  {name:{width}}  {value}".rstrip() for name, value in rows.items())]
    return "\n".join(lines)
