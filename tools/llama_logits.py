"""Compare the next token of SmolLM2 as we load it with llama.cpp's, on the same GGUF file: `python -m tools.llama_logits`.

llama.cpp (the package xllamacpp, extra `rivals`) gives the log-probabilities of its ten likeliest tokens. It rounds
activations to 8 bits where weights are in blocks, so it differs from exact arithmetic by more than the last bits:
`difference` is the mean over those ten, in nats. A *near-tie* is a prompt whose two best tokens lie closer than `TIE` here.
The same with weights that are unpacked, but not rounded to bf16, says what storing them so costs. Writes
docs/results/llama_logits.json.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from attnpred.evaluation.book import demo_book
from attnpred.hf import load_model
from attnpred.hf.fetch import fetch_gguf
from attnpred.hf.gguf_file import gguf_arguments

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "llama_logits.json"
MODEL = "smollm2"
PROMPTS, TOKENS, APART = 50, 48, 3000
TIE = 0.25
TOP = 10


@dataclass(frozen=True, slots=True)
class Agreement:
    """same: prompts with the same next token; near_ties: others that are near-ties; difference: nats, mean of all."""

    prompts: int
    same: int
    near_ties: int
    difference: float
    largest: float


def prompts(tokenizer: Any) -> list[list[int]]:
    """Return ids of `PROMPTS` places of the book."""
    book = demo_book()
    texts = [book[i * APART % (len(book) - APART) :][:APART] for i in range(PROMPTS)]
    return [tokenizer(text, verbose=False)["input_ids"][:TOKENS] for text in texts]


@contextmanager
def llama(path: Path) -> Iterator[Any]:
    """Yield llama.cpp with that file."""
    import xllamacpp

    given = xllamacpp.CommonParams()
    given.model.path = str(path)
    given.n_ctx, given.n_parallel, given.warmup = 1024, 1, False
    given.cpuparams.n_threads = torch.get_num_threads()
    yield xllamacpp.Server(given)


def likeliest(server: Any, ids: Sequence[int]) -> dict[int, float]:
    """Return the log-probabilities of llama.cpp's ten likeliest next tokens."""
    wanted = {"prompt": list(ids), "n_predict": 1, "n_probs": TOP, "temperature": 0, "post_sampling_probs": False}
    answer = server.handle_completions(wanted)
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {one["id"]: one["logprob"] for one in first["top_logprobs"]}


@torch.no_grad()
def ours(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the log-probabilities of the next token, fp32 [vocabulary]."""
    return torch.log_softmax(model(torch.tensor([list(ids)])).logits[0, -1].float(), -1)


def compare(rows: Sequence[Tensor], theirs: Sequence[dict[int, float]]) -> Agreement:
    """Return how far the two engines agree."""
    same = near = 0
    differences = []
    for row, other in zip(rows, theirs, strict=True):
        best, their_best = int(row.argmax()), max(other, key=lambda token: other[token])
        same += best == their_best
        near += best != their_best and float(row[best] - row[their_best]) < TIE
        differences += [abs(float(row[token]) - value) for token, value in other.items()]
    return Agreement(len(rows), same, near, sum(differences) / len(differences), max(differences))


def measure(also_exact: bool = False) -> dict[str, Agreement]:
    """Return the agreement with the weights as they are stored, and with those that are not rounded."""
    model, tokenizer = load_model(MODEL, device="cpu", dtype=torch.float32)
    ids = prompts(tokenizer)
    path = fetch_gguf(MODEL)
    with llama(path) as server:
        theirs = [likeliest(server, one) for one in ids]
    found = {"stored": compare([ours(model, one) for one in ids], theirs)}
    if also_exact:
        how = {"quantization_config": transformers.GgufConfig(dequantize=True), "dtype": torch.float32}
        exact = transformers.AutoModelForCausalLM.from_pretrained(**gguf_arguments(path), **how).eval()
        found["exact"] = compare([ours(exact, one) for one in ids], theirs)
    return found


def main() -> int:
    """Measure, write and print."""
    found = {name: asdict(one) for name, one in measure(also_exact=True).items()}
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
