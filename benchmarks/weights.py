"""What packing the weights loses: bits per byte of a text that the model has not seen, and how far its words move.

    python -m benchmarks.weights [--models smollm2 demo] [--windows 8] [--tokens 512] [--out docs/results/weights.json]

Each window of the text is read by the model as it is in fp32, and with its weights packed (`attnpred.hf.packing`). Bits per
byte are the sum of -log2 p of all tokens but a window's first, over the bytes of these tokens; `kl` is the divergence from
fp32 in nats per token, `same` the share of tokens whose likeliest next token stays the same. `row` is int8 with one scale
for a whole row instead of 32 numbers, computed here only, to compare.

SmolLM2's file has its weights in Q4_1, which is what int4 is here: packing them again loses little. The demo model was
trained in fp32, and shows what a model loses that was never rounded. The last line is one JSON object.
"""

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnpred.evaluation.book import demo_book
from attnpred.hf import load_model, pack_weights
from benchmarks import options
from benchmarks.environment import environment


@contextmanager
def rounded_by_rows(model: Any) -> Iterator[None]:
    """Round the weights of linear layers to int8 with a scale for each row, and give them back."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    before = [layer.weight for layer in layers]
    try:
        for layer in layers:
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            layer.weight = nn.Parameter((layer.weight.detach() / scale).round() * scale, requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight = weight


@torch.no_grad()
def logits(model: Any, windows: Tensor) -> list[Tensor]:
    """Return the log-probabilities of each window [1, tokens - 1, vocabulary]."""
    return [torch.log_softmax(model(window[None, :-1]).logits.float(), -1) for window in windows]


def measure(name: str, windows: int, tokens: int) -> list[dict[str, Any]]:
    """Return a row for each variant of a model."""
    model, tokenizer = load_model(name, device="cpu", dtype=torch.float32)
    ids = tokenizer(demo_book(), return_tensors="pt", verbose=False, add_special_tokens=False)["input_ids"][0]
    apart = (len(ids) - tokens) // max(1, windows - 1)
    chosen = torch.stack([ids[i * apart : i * apart + tokens] for i in range(windows)])
    size = sum(len(tokenizer.decode(window[1:]).encode()) for window in chosen)
    rows, exact = [], list[Tensor]()
    for variant in ("fp32", "int8", "int4", "row"):
        with ways_of(model, variant):
            found = logits(model, chosen)
        exact = exact or found
        spent = sum(
            -float(one.gather(-1, window[None, 1:, None]).sum()) for one, window in zip(found, chosen, strict=True)
        )
        pairs = list(zip(exact, found, strict=True))
        kl = sum(float((a.exp() * (a - b)).sum()) for a, b in pairs) / (windows * (tokens - 1))
        same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs) / (windows * (tokens - 1))
        rows.append(
            {"model": name, "weights": variant, "bits_per_byte": round(spent / math.log(2) / size, 5)}
            | {"kl": float(f"{kl:.3g}"), "same": round(same, 4), "tokens": windows * (tokens - 1)}
        )
    return rows


def ways_of(model: Any, variant: str) -> AbstractContextManager[object]:
    """Return a `with` block in which the model has its weights so."""
    if variant in ("int8", "int4"):
        return pack_weights(model, variant)
    return rounded_by_rows(model) if variant == "row" else nullcontext()


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="python -m benchmarks.weights", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["smollm2", "demo"])
    parser.add_argument("--windows", type=options.count, default=8)
    parser.add_argument("--tokens", type=options.count, default=512)
    parser.add_argument("--out", type=Path, help="write the last line there too")
    args = parser.checked(arguments)
    rows = []
    for name in args.models:
        for row in measure(name, args.windows, args.tokens):
            rows.append(row)
            print(
                f"{name} {row['weights']}: {row['bits_per_byte']:.4f} bits per byte, KL {row['kl']:.2g}, "
                f"same {row['same']:.1%}",
                flush=True,
            )
    line = json.dumps({"rows": rows, "windows": args.windows, "window_tokens": args.tokens} | environment())
    options.write_line(args, line)
    print(line)


if __name__ == "__main__":
    main()
