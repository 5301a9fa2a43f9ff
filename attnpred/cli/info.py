"""`attnpred info`: what is installed and what there is to choose from."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

PACKAGES = ("attnpred", "torch", "transformers")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show versions, devices, policies, kernels."""
    facts = collect()
    print(json.dumps(facts) if as_json else _text(facts))


def collect() -> dict[str, Any]:
    """Return what the command shows, ready for JSON."""
    from attnpred.evaluation import TASKS
    from attnpred.kernels import BACKENDS, DIGEST, DIGEST_BACKENDS
    from attnpred.policies import POLICIES
    from attnpred.store import STORES

    return {
        "versions": {"python": platform.python_version(), **{name: _installed(name) for name in PACKAGES}},
        "devices": _devices(),
        "policies": {name: _first_line(policy) for name, policy in POLICIES.items()},
        "kernels": {name: _first_line(backend) for name, backend in BACKENDS.items()},
        "selection kernels": {
            name: _first_line(backend) + (" (in use)" if name == DIGEST else "")
            for name, backend in DIGEST_BACKENDS.items()
        },
        "stores": {name: _first_line(store) for name, store in STORES.items()},
        "tasks": {name: _first_line(task) for name, task in TASKS.items()},
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
