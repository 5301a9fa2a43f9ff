"""Where each microsecond of a decode step goes: the 1B shape at 32K, `predicted` with everything on, and its floor.

    python -m benchmarks.step_profile [--context 32768] [--layers 16] [--steps 16] [--json]

Theory first. 16 layers of this shape read 2 GB of weights in a step, and at a budget of 1,024 tokens 32 MiB of keys and
values and about 1 % of the cache in digests: so all but the linear layers should be small. What is left is calls: of
functions of Python, of kernels of torch, each some microseconds, times 16 layers.

Clocks are put around the functions of `PARTS` and the modules of the model. The time of a part is its own, without what it
calls of other parts, so that all of them add up to the step; `rest of the model` is what no part has. Steps with and
without clocks, and steps of the floor, take turns; figures are medians over steps, calls are means. A part that a step does
only now and then (`seal`) has its mean. The last line is one JSON object.
"""

import argparse
import importlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.baselines import make_variants, step, switchable
from benchmarks.decode import check, settings_for
from benchmarks.environment import environment
from benchmarks.models import DTYPES, SHAPES, fill, random_model

REST = "rest of the model: rotary embedding, residuals, views, Python"
LINEAR, HEAD, NORM, ACTIVATION = "linear layers", "language-model head", "norms", "activation of the MLP"
ATTENTION = "attention function: finds its layer, calls the step"


class Part(NamedTuple):
    """A function that gets a clock: where it is looked up when it is called."""

    module: str
    name: str
    label: str


PARTS = (
    Part("attnpred.hf.cache", "TieredCache.update", "cache append"),
    Part("attnpred.decode", "LayerDecoder.step", "step: bookkeeping"),
    Part("attnpred.decode", "seal", "seal: digests of full blocks (mean)"),
    Part("attnpred.choosing", "Chooser.select", "select: bookkeeping"),
    Part("attnpred.kernels.numba_digest", "choose", "select: digests scored, features weighed, the best taken"),
    Part("attnpred.rest_rows", "sparse_decode", "sparse attention"),
    Part("attnpred.decode", "LayerDecoder._count", "counters"),
    Part("attnpred.decode", "LayerDecoder._push", "remember: bookkeeping"),
    Part("attnpred.kernels", "remember", "remember: the past of all blocks"),
    Part("attnpred.choosing", "Chooser.forecast", "forecast"),
)
"""Names move when code does: whoever moves one corrects it here."""


class Clocks:
    """Own times of parts: what a part calls of other parts is theirs."""

    def __init__(self) -> None:
        self.is_on = False
        self.spent: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.inner: list[float] = []

    def around(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """Return `function` with a clock."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if not self.is_on:
                return function(*arguments, **named)
            self.inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent = time.perf_counter() - began
                self.spent[label] += spent - self.inner.pop()
                self.calls[label] += 1
                if self.inner:
                    self.inner[-1] += spent

        return timed

    def of_step(self, take: Callable[[], object]) -> tuple[dict[str, float], dict[str, int]]:
        """Return microseconds and calls of each part of one step."""
        self.spent.clear()
        self.calls.clear()
        self.is_on = True
        try:
            take()
        finally:
            self.is_on = False
        return {label: spent * 1e6 for label, spent in self.spent.items()}, dict(self.calls)


def place_of(part: Part) -> tuple[Any, str]:
    """Return the object that holds the function, and its name there. Raises `LookupError` where there is none."""
    try:
        owner: Any = importlib.import_module(part.module)
        *path, last = part.name.split(".")
        for name in path:
            owner = getattr(owner, name)
        getattr(owner, last)
    except (ImportError, AttributeError) as error:
        raise LookupError(
            f"got no {part.name} in {part.module}, expected the function called {part.label!r}: "
            "correct its line of PARTS in benchmarks/step_profile.py"
        ) from error
    return owner, last


def label_of(name: str, module: torch.nn.Module) -> str | None:
    """Return the part that a module of the model belongs to; the model itself, whose name is empty, is the rest."""
    if not name:
        return REST
    if isinstance(module, torch.nn.Linear):
        return HEAD if name == "lm_head" else LINEAR
    if type(module).__name__.endswith("Norm"):
        return NORM
    return ACTIVATION if name.endswith("act_fn") else None


@contextmanager
def clocks_on(model: Any, parts: tuple[Part, ...] = PARTS) -> Iterator[Clocks]:
    """Put clocks around everything while this lasts."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from attnpred.hf.cache import IMPLEMENTATION

    clocks = Clocks()
    places = [(*place_of(part), part.label) for part in parts]
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in places]
    modules = [(module, label) for name, module in model.named_modules() if (label := label_of(name, module))]
    try:
        for owner, name, label in places:
            setattr(owner, name, clocks.around(getattr(owner, name), label))
        for module, label in modules:
            module.forward = clocks.around(module.forward, label)
        ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = clocks.around(ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION], ATTENTION)
        yield clocks
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
        for module, _ in modules:
            del module.forward
        del ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]


def measure(model: Any, context: int, dtype: torch.dtype, budget: int, steps: int) -> dict[str, Any]:
    """Return the rows, and whole steps with and without clocks."""
    profiles: dict[str, list[tuple[dict[str, float], dict[str, int]]]] = {"floor": [], "predicted": []}
    plain: list[float] = []
    tokens = iter(torch.randint(0, model.config.vocab_size, (2 * steps + 4, 1, 1)))
    with switchable(model), clocks_on(model) as clocks:
        variants = make_variants(model, tuple(profiles), context, settings_for(budget))
        fill([variant.cache for variant in variants], model.config, context, dtype)
        for turn in range(steps + 1):
            token = next(tokens)
            for variant in variants:
                found = clocks.of_step(lambda: step(model, variant, token))  # noqa: B023 (called at once)
                if turn:  # the first warms up
                    profiles[variant.name].append(found)
            taken = step(model, variants[-1], next(tokens))[0]
            plain += [taken * 1e3] if turn else []
    mine, floor = profiles["predicted"], profiles["floor"]
    labels = [LINEAR, HEAD, NORM, ACTIVATION, REST, ATTENTION, *(part.label for part in PARTS)]
    for label in labels:
        if not any(label in spent for spent, _ in mine):
            raise LookupError(
                f"got no call of {label!r} in {steps} steps, expected some: correct PARTS, or take more steps"
            )

    def us(profile: list[tuple[dict[str, float], dict[str, int]]], label: str) -> float:
        taken = [spent.get(label, 0.0) for spent, _ in profile]
        return statistics.mean(taken) if label.endswith("(mean)") else statistics.median(taken)

    whole = sum(us(mine, label) for label in labels)
    rows = [
        {"label": label, "us": round(us(mine, label), 1), "floor_us": round(us(floor, label), 1)}
        | {"calls": round(statistics.mean(calls.get(label, 0) for _, calls in mine), 2)}
        | {"share": round(us(mine, label) / whole, 5)}
        for label in labels
    ]
    totals = {name: [sum(spent.values()) for spent, _ in profile] for name, profile in profiles.items()}
    return {
        "rows": sorted(rows, key=lambda row: -float(row["us"])),
        "step_us": round(statistics.median(totals["predicted"]), 1),
        "floor_step_us": round(statistics.median(totals["floor"]), 1),
        "plain_step_us": round(statistics.median(plain), 1),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--context", type=int, default=1 << 15)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16, help="at least 16: blocks fill up every sixteenth token")
    parser.add_argument("--out", type=Path, help="write the last line there too")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    args = parser.parse_args(arguments)
    check()
    model = random_model(args.layers, shape=args.shape, dtype=DTYPES[args.dtype])
    found = measure(model, args.context, DTYPES[args.dtype], args.budget, args.steps)
    if not args.json:
        print(f"{'':70}{'predicted':>10}{'floor':>10}   share   calls")
        for row in found["rows"]:
            print(f"{row['label']:<70}{row['us']:10,.0f}{row['floor_us']:10,.0f}{row['share']:8.1%}{row['calls']:8.1f}")
        print(f"{'a whole step':<70}{found['step_us']:10,.0f}{found['floor_step_us']:10,.0f}")
        print(f"{'a whole step without clocks':<70}{found['plain_step_us']:10,.0f}")
    about = {"shape": args.shape, "dtype": args.dtype, "context": args.context, "budget": args.budget}
    line = json.dumps(found | about | {"layers": model.config.num_hidden_layers} | environment())
    if args.out:
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
