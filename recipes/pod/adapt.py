"""Continue the training of the demo LM with layers that share the keys of distant tokens (PoD), beside a dense control.

    OMP_NUM_THREADS=1 python -m recipes.pod.adapt --data FOLDER --groups groups.json --work FOLDER --out result.json

FOLDER of `--data` is the work folder of a demo LM (`recipes.demo_lm.train` fills it); groups are those of `attnpred
analyse-layers demo`, made again for `--delta`, because no two layers of the demo LM reach the published 0.5. Both runs
begin with the shipped weights, and see the same sequences in the same order: sharing from the first step on in one, never
in the other. `--out` has the held-out losses before and after, each with and without sharing, so that what the further
training is worth by itself can be taken off; `work/shared.safetensors` and `work/dense.safetensors` the weights. A run
that was stopped goes on where it last saved, if it is called with the same options: what is drawn depends on the step.

The paper adapts a model of 8B parameters for 5B tokens at 32K. What is here is a trial of the same kind, not of the size.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from attnpred.files import write_text
from attnpred.hf import DEMO_MODEL
from attnpred.kernels.shared import Split
from attnpred.predictor.layer_groups import LayerGroups
from recipes.demo_lm import model
from recipes.demo_lm.samples import ANSWER, Sampler
from recipes.demo_lm.train import LONG, Stage, batch

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
ARMS = ("shared", "dense")
HELD_OUT, SEED = 16, 7  # windows of the held-out books, and questions planted in them
SAVE_SECONDS = 60


def mixing(leaders: dict[int, tuple[int, ...]], split: Split) -> Attend:
    """Return the attention of `model.logits` with sharing, for training: one softmax over near and distant tokens.

    Of layer i it takes q, k, v [B, Hq, L, D], the keys and values of a kv head repeated for its query heads.
    """
    seen: dict[int, Tensor] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen[layer] = k
        heads, group = leaders[layer], q.shape[1] // len(leaders[layer])
        if all(found == layer for found in heads):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        far = torch.cat([seen[found][:, h * group : (h + 1) * group] for h, found in enumerate(heads)], 1)
        places = torch.arange(q.shape[2])
        near, distant = split.near(places, places)[:, None], split.distant(places, places)[:, None]
        own, lower = (q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5 for keys in (k, far))
        logits = torch.where(distant, lower, own).float().masked_fill(~(near | distant), -math.inf)
        return torch.softmax(logits, -1).to(v.dtype) @ v

    return attend


def losses(params: dict[str, Tensor], shape: model.Shape, drawn: tuple[Tensor, ...], attend: Attend | None) -> Tensor:
    """Return the loss of each target, [B * L]."""
    tokens, targets, _, positions = drawn
    found = model.logits(params, shape, tokens, positions, attend).float().flatten(0, 1)
    return F.cross_entropy(found, targets.flatten(), reduction="none")


@torch.no_grad()
def held_out(
    params: dict[str, Tensor], shape: model.Shape, drawn: list[tuple[Tensor, ...]], attend: Attend | None
) -> dict[str, float]:
    """Return mean losses in nats: of text, and of the digits of answers."""
    each = torch.cat([losses(params, shape, one, attend) for one in drawn])
    weights = torch.cat([one[2].flatten() for one in drawn])
    return {name: float(each[weights == kind].mean()) for name, kind in (("text", 1.0), ("answer", ANSWER))}


def train(
    params: dict[str, Tensor], shape: model.Shape, sampler: Sampler, stage: Stage, lr: float, attend: Attend | None,
    checkpoint: Path,
) -> None:  # fmt: skip
    """Continue the training for `stage.tokens` tokens; the learning rate falls to nothing as a cosine."""
    optimizer = torch.optim.AdamW(list(params.values()), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    done = _resumed(checkpoint, params, optimizer) if checkpoint.exists() else 0
    started = saved = time.time()
    since = done
    while done < stage.tokens:
        sampler.rng = random.Random(f"{SEED + 1}/{done}")
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done / stage.tokens))
        drawn = batch(sampler, stage, shape.max_positions)
        weights = drawn[2].flatten()
        loss = (losses(params, shape, drawn, attend) * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        done += drawn[0].numel()
        if time.time() - saved > SAVE_SECONDS or done >= stage.tokens:
            saved = time.time()
            rate = (done - since) / (saved - started)
            print(
                f"{checkpoint.stem}: {done} of {stage.tokens} tokens, {rate:.0f} a second, loss {loss:.4f}", flush=True
            )
            _save(checkpoint, params, optimizer, done)


def _save(path: Path, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, done: int) -> None:
    state = {name: tensor.detach() for name, tensor in params.items()} | {"done": torch.tensor(done)}
    for name, tensor in params.items():
        state |= {f"{kind}:{name}": value for kind, value in optimizer.state[tensor].items()}
    save_file(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _resumed(path: Path, params: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Fill parameters and the optimizer's state from `path`; return the tokens that were done."""
    state = load_file(path)
    for name, tensor in params.items():
        tensor.data.copy_(state[name])
        optimizer.state[tensor] = {kind: state[f"{kind}:{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
    return int(state["done"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--groups", type=Path, required=True, help="file of `attnpred analyse-layers demo`")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="file of the result; default: WORK/result.json")
    parser.add_argument("--delta", type=float, default=0.25)
    parser.add_argument("--sinks", type=int, default=16)
    parser.add_argument("--recent", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each of the two runs")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4)
    args = parser.parse_args(argv)
    shape = model.Shape()
    groups = LayerGroups.load(args.groups).regrouped(args.delta)
    if not groups.shares or groups.layers != tuple(range(shape.layers)):
        raise SystemExit(f"got groups {groups.groups} at delta {args.delta}, expected some of the demo LM that share")
    sharing = mixing(groups.leaders(), Split(args.sinks, args.recent))
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    stage = Stage(args.tokens, args.length, args.batch, args.length * 3 // 4, LONG)
    unseen = Sampler(np.load(args.data / "heldout.npy", mmap_mode="r"), tokenizer, random.Random(SEED))
    fixed = Stage(0, args.length, HELD_OUT, args.length * 3 // 4, {"planted": 0.5, "book": 0.5})
    drawn = [
        tuple(part[i : i + 4] for part in every)
        for every in [batch(unseen, fixed, shape.max_positions)]
        for i in range(0, HELD_OUT, 4)
    ]

    def scores(params: dict[str, Tensor]) -> dict[str, Any]:
        return {arm: held_out(params, shape, drawn, sharing if arm == "shared" else None) for arm in ARMS}

    def shipped() -> dict[str, Tensor]:
        found = load_file(DEMO_MODEL / "model.safetensors")
        return {name: tensor.float().requires_grad_() for name, tensor in found.items()}

    args.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "groups": groups.groups, "delta": args.delta, "sinks": args.sinks, "recent": args.recent, "dropped": groups.dropped,
        "tokens": args.tokens, "length": args.length, "batch": args.batch, "lr": args.lr, "before": scores(shipped()), "after": {},
    }  # fmt: skip
    for arm in ARMS:
        started, params = time.time(), shipped()
        sampler = Sampler(np.load(args.data / "train.npy", mmap_mode="r"), tokenizer, random.Random())
        train(
            params,
            shape,
            sampler,
            stage,
            args.lr,
            sharing if arm == "shared" else None,
            args.work / f"{arm}.checkpoint",
        )
        result["after"][arm] = scores(params) | {"seconds": round(time.time() - started)}
        save_file({name: tensor.detach() for name, tensor in params.items()}, args.work / f"{arm}.safetensors")
    write_text(args.out or args.work / "result.json", json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
