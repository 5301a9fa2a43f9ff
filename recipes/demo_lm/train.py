"""Train the demo LM: recall first, with few symbols and many answers per sequence, then longer and longer.

Run `python -m recipes.demo_lm.train --books FOLDER --work FOLDER` (FOLDER as `corpus.py` describes). It resumes from
`work/checkpoint.safetensors`, saves every few minutes, and logs one JSON object per 50 steps to `work/log.jsonl` with
the losses of text and of answers apart. Two cores and the default `STAGES` take about 75 minutes. `--scale` shortens
every stage and the learning rate's course alike; sizes and seed are options too (`recipes.second_lm` uses them).
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from attnpred.evaluation.facts import ADJECTIVES, KEEPERS, NAMES, NOUNS
from recipes.demo_lm import corpus, model
from recipes.demo_lm.samples import ANSWER, Sampler


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training: `tokens` in sequences of `length`, `batch` at a time, kinds drawn by weight."""

    tokens: int
    length: int
    batch: int
    gap: int
    mix: dict[str, float]


RECALL = {"dense": 0.5, "restated": 0.15, "repeat": 0.1, "book": 0.25}
MIXED = {"dense": 0.08, "restated": 0.17, "planted": 0.2, "repeat": 0.1, "book": 0.45}
LONG = {"restated": 0.1, "planted": 0.45, "repeat": 0.1, "book": 0.35}
STAGES = (
    Stage(1_000_000, 128, 16, 64, RECALL),
    Stage(1_500_000, 256, 16, 128, {"dense": 0.25, "restated": 0.3, "planted": 0.1, "repeat": 0.1, "book": 0.25}),
    Stage(8_000_000, 512, 8, 400, MIXED),
    Stage(3_500_000, 1024, 4, 800, LONG),
    Stage(2_500_000, 2048, 2, 1600, LONG),
    Stage(2_000_000, 4096, 1, 3500, LONG),
)
TOTAL = sum(stage.tokens for stage in STAGES)
PEAK, WARMUP, COOLDOWN = 1.5e-3, 0.005, 0.6


def learning_rate(done: float) -> float:
    """Warm up over 1 %, hold, then fall linearly to 5 % over the last 60 % of all tokens."""
    x = done / TOTAL
    return PEAK * min(1.0, x / WARMUP + 0.02) * min(1.0, max(0.05, (1 - x) / COOLDOWN))


def stage_at(done: float) -> Stage:
    for stage in STAGES:
        if done < stage.tokens:
            return stage
        done -= stage.tokens
    raise StopIteration


def batch(sampler: Sampler, stage: Stage, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, targets, weights and positions, each [batch, length]."""
    rows = [
        sampler.draw(kind, stage.length, stage.gap)
        for kind in sampler.rng.choices(list(stage.mix), list(stage.mix.values()), k=stage.batch)
    ]
    ids = torch.tensor([row[0] for row in rows])
    weights = torch.tensor([row[1] for row in rows])
    positions = torch.tensor(np.stack([sampler.positions(stage.length, limit) for _ in rows])).float()
    return ids[:, :-1], ids[:, 1:], weights[:, 1:], positions


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stop-after", type=int, help="tokens; for a trial run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the schedule, as a share of `STAGES`")
    model.add_shape_options(parser)
    args = parser.parse_args(argv)
    total = TOTAL * args.scale
    stop = total if args.stop_after is None else min(total, args.stop_after)
    words = [*NAMES, *ADJECTIVES, *NOUNS, *" ".join(KEEPERS).split(), "Remember", "Note", "Mark", "Everyone"]
    corpus.prepare(args.books, args.work, words)

    shape = model.shape_of(args)
    params = model.init(shape, args.seed)
    matrices = [p for n, p in params.items() if p.ndim == 2]
    vectors = [p for n, p in params.items() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    done, step = 0, 0
    checkpoint = args.work / "checkpoint.safetensors"
    if checkpoint.exists():
        state = load_file(checkpoint)
        done, step = int(state["done"]), int(state["step"])
        for i, (name, p) in enumerate(params.items()):
            p.data.copy_(state[name])
            optimizer.state[p] = {k: state[f"{k}.{i}"] for k in ("exp_avg", "exp_avg_sq")} | {
                "step": torch.tensor(float(step))
            }
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    sampler = Sampler(np.load(args.work / "train.npy", mmap_mode="r"), tokenizer, random.Random(f"{args.seed}/{done}"))

    def losses(tokens: Tensor, targets: Tensor, weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        each = F.cross_entropy(
            model.logits(params, shape, tokens, positions).float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        return (each * weights.flatten()).sum() / weights.sum(), each.detach()

    compiled = torch.compile(losses)
    log = (args.work / "log.jsonl").open("a")
    meter = {"text": [0.0, 0], "answer": [0.0, 0], "copy": [0.0, 0]}
    started = saved = time.time()
    tokens_logged = done
    while done < stop:
        stage = stage_at(done / args.scale)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done / args.scale)
        tokens, targets, weights, positions = batch(sampler, stage, shape.max_positions)
        loss, each = compiled(tokens, targets, weights, positions)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        flat = weights.flatten()
        for name, mask in (("text", flat == 1.0), ("answer", flat == ANSWER), ("copy", flat == 2.0)):
            meter[name][0] += float(each[mask].sum())
            meter[name][1] += int(mask.sum())
        done, step = done + tokens.numel(), step + 1
        if step % 50 == 0:
            now = time.time()
            row = {
                "step": step,
                "tokens": done,
                "length": stage.length,
                "rate": round((done - tokens_logged) / (now - started)),
            }
            row |= {name: round(total / max(1, count), 4) for name, (total, count) in meter.items()}
            print(json.dumps(row), file=log, flush=True)
            meter = {name: [0.0, 0] for name in meter}
            started, tokens_logged = now, done
        if time.time() - saved > 240 or done >= stop:
            state = {name: p.detach() for name, p in params.items()} | {
                "done": torch.tensor(done),
                "step": torch.tensor(step),
            }
            for i, p in enumerate(params.values()):
                state |= {f"{k}.{i}": optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}
            save_file(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            saved = time.time()


if __name__ == "__main__":
    main()
