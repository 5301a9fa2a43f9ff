"""Full cache against a policy, on one long text: facts answered, bits per byte, attention recovered, bytes read, time.

What the demo runs. Bytes and compression are counted by the cache while it continues the text (`attnpred.telemetry`):
all keys and values a dense step would read over all that were read, dense layers and calibration rows included. The
full cache lies in memory; `settings.offload` says where the blocks of the other one lie. The run that measures recovery
looks at every key, so it is a run of its own, in memory, and is not the one that is timed.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnpred import checks, hf
from attnpred.capture import attention_trace
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.evaluation import facts_task
from attnpred.evaluation.continuation import Continuation, continue_text
from attnpred.evaluation.shown import busiest_head
from attnpred.evaluation.variants import Variant
from attnpred.hf.sizes import layer_shapes
from attnpred.policies.base import Policy, View
from attnpred.policies.select import zone_at

LATE_SHARE = 0.06
"""Unless told otherwise, with a slow tier. Of the 34 blocks of a selection 2: what is fetched late is waited for."""

IN_MEMORY: dict[str, Any] = dict.fromkeys(("offload", "offload_dir", "offload_dtype", "host_limit", "disk_limit"))
"""Settings of a cache that lies in fast memory altogether."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: `context` tokens, `documents` texts with `facts` each, `steps` tokens of continuation."""

    context: int = 8192
    documents: int = 5
    facts: int = 4
    steps: int = 256
    seed: int = 1

    def __post_init__(self) -> None:
        checks.seed(self.seed)
        for name, most in (
            ("context", checks.TOKENS),
            ("documents", 10_000),
            ("facts", 10_000),
            ("steps", checks.TOKENS),
        ):
            checks.whole(name, getattr(self, name), 1, most)


@dataclass(frozen=True, slots=True)
class HeadOverTime:
    """Attention of one head over the steps, rows = steps, columns = blocks: what happened, and what was forecast.

    true, predicted: fp32 [T, N] (predicted: scores, between sinks and recent window); selected: bool [T, N].
    """

    layer: int
    head: int
    true: Tensor
    predicted: Tensor
    selected: Tensor


def documents(tokenizer: Any, text: str, plan: Plan) -> list[facts_task.FactsDocument]:
    """Plant facts in successive parts of `text`."""
    book = tokenizer(text, verbose=False, return_tensors="pt")["input_ids"][0]
    shift = max(0, (len(book) - plan.context) // max(1, plan.documents))
    return [
        facts_task.plant(tokenizer, book[i * shift :], plan.context, plan.facts, plan.seed + i)
        for i in range(plan.documents)
    ]


def continuation_tokens(tokenizer: Any, text: str, plan: Plan) -> Tensor:
    """Return the plain text to continue, [1, context + steps]."""
    tokens = tokenizer(text, verbose=False, return_tensors="pt")["input_ids"]
    wanted = plan.context + plan.steps
    if tokens.shape[1] < wanted:
        raise ConfigError(
            f"got {tokens.shape[1]} tokens of text, expected at least {wanted}: give a longer text, or lower context or steps"
        )
    return tokens[:, :wanted]


def compare(
    model: Any,
    tokenizer: Any,
    text: str,
    plan: Plan,
    policy: str,
    chooses: Policy[Any],
    settings: CacheConfig,
    say: Any = print,
) -> dict[str, Any]:
    """Run the plan with the full cache and with `chooses`, called `policy`; return the figures of `--model demo --json`."""
    asked = documents(tokenizer, text, plan)
    tokens = continuation_tokens(tokenizer, text, plan)
    result: dict[str, Any] = {
        "context_tokens": plan.context,
        "budget_tokens": settings.budget_blocks(plan.context) * settings.block_size,
    }
    facts = [fact for document in asked for fact in document.facts]
    given: dict[str, list[str]] = {}
    in_memory = replace(settings, **IN_MEMORY)
    for name, chosen, by, where in (("full", "full", "full", in_memory), ("predicted", policy, chooses, settings)):
        say(f"{chosen}: {plan.documents * plan.facts} questions about {plan.documents} texts of {plan.context} tokens")
        with hf.attach(model, policy=by, config=where) as attached:
            given[name] = facts_task.answers(model, tokenizer, asked)
            say(f"{chosen}: continuing the book by {plan.steps} tokens")
            with attached.new_cache() as cache:
                continued = continue_text(model, tokenizer, tokens, plan.context, cache)
                correct = sum(answer == fact.answer for answer, fact in zip(given[name], facts, strict=True))
                result[name] = _row(correct, len(facts), continued, cache.stats(), len(cache.decoders))
    result["compression"] = result["full"]["read_bytes_per_step"] / result["predicted"]["read_bytes_per_step"]
    result["answers"] = [
        {
            "question": fact.question.strip(),
            "expected": fact.answer.strip(),
            "full": full.strip(),
            "predicted": part.strip(),
        }
        for fact, full, part in zip(facts, given["full"], given["predicted"], strict=True)
    ]
    say("recovery: comparing each step's selection with its true attention")
    measured, picture = _measure(model, tokenizer, tokens, plan, chooses, in_memory)
    return result | measured | {"picture": picture}


def _row(correct: int, total: int, continued: Continuation, stats: dict[str, Any], layers: int) -> dict[str, Any]:
    counted = stats["total"]
    steps = counted["steps"] / layers
    row = {
        "correct": correct,
        "total": total,
        "bits_per_byte": continued.bits_per_byte,
        "read_bytes_per_step": (counted["bytes_read"] + counted["calibration_bytes"] + counted["digest_bytes"]) / steps,
        "tokens_attended": counted["tokens_attended"],
        "ms_per_token": continued.ms_per_token,
        "fast_bytes": stats["fast_bytes"],
    }
    if "hit_rate" in counted:
        row |= {"hit_rate": counted["hit_rate"], "exposed_wait_ms": counted["exposed_wait_ms"] / steps}
    return row


def _measure(
    model: Any, tokenizer: Any, tokens: Tensor, plan: Plan, policy: Policy[Any], settings: CacheConfig
) -> tuple[dict[str, Any], HeadOverTime | None]:
    """Run again with the true attention computed beside each step: recovery, and the picture of one head."""
    watched = hf.make_settings(settings, {"measure_recovery": True})
    # The first forecast is made after the first step, so the picture begins with the query after it.
    true = attention_trace(model, tokens.to(model.device), plan.steps - 1, settings.block_size)
    layer, head = busiest_head(true, settings)
    scores: list[Tensor] = []
    chosen: list[Tensor] = []
    forecasts: list[Tensor] = []
    with hf.attach(model, policy=policy, config=watched) as attached:
        cache = attached.new_cache()

        def watch(step: int) -> None:
            decoder = cache.decoders[sorted(cache.decoders)[layer]]
            if decoder.attended is None or not decoder.memory.rows:
                return
            zone, selection = decoder.attended
            if forecasts:
                scores.append(forecasts[-1])
                chosen.append(
                    torch.zeros(true.shape[3], dtype=torch.float32, device="cpu").scatter_(
                        0, selection[0, head].clamp_min(0), 1.0
                    )
                )
            view = View(decoder.memory, zone_at(settings, zone.length + 1), decoder.layer)
            found = decoder.policy.score(view).expand(1, selection.shape[1], -1)[0, head]
            forecasts.append(found[: true.shape[3]])

        continue_text(model, tokenizer, tokens, plan.context, cache, watch)
        stats = cache.stats()["total"]
    measured = {name: stats.get(name, 1.0) for name in ("attention_recovery", "recovery_ratio")}
    if not scores:
        return measured, None
    forecast = torch.nn.utils.rnn.pad_sequence([x.cpu().float() for x in scores], batch_first=True)
    forecast = torch.nn.functional.pad(forecast, (0, true.shape[3] - forecast.shape[1]))
    return measured, HeadOverTime(
        layer, head, true[layer, head, : len(scores)].cpu(), forecast, torch.stack(chosen).bool()
    )


def digest_share(model_config: Any, policy: Policy[Any], item_size: int, block_size: int) -> float:
    """Return the bytes of digests that a step of `policy` reads per byte of KV, whose numbers have `item_size` bytes."""
    settings, kind = CacheConfig(block_size=block_size), {4: torch.float32, 2: torch.float16}[item_size]
    read = held = 0
    for layer in layer_shapes(model_config, settings, policy, kind, tokens=1):
        memory = policy.memory(settings, layer.index)
        if memory.sealed >= 0:
            memory.seal(torch.zeros(1, layer.kv_heads, block_size, layer.key_dim, dtype=kind, device="cpu"))
            read += memory.look_bytes()
        held += layer.kv_heads * block_size * (layer.key_dim + layer.value_dim) * item_size
    return read / held


def compressed(
    model: Any, variant: Variant, config: CacheConfig, context: int, compression: float
) -> tuple[Policy[Any], CacheConfig]:
    """Return the policy of `variant`, and settings with which it reads 1/`compression` of the KV, all told."""
    policy, own = variant.make(model.config, config)
    digests = digest_share(model.config, policy, next(model.parameters()).element_size(), own.block_size)
    settings = demo_settings(own, context, compression, int(model.config.num_hidden_layers), digests)
    if settings.late_share is None and settings.offload is not None:
        settings = replace(settings, late_share=LATE_SHARE)
    return policy, settings


def demo_settings(
    config: CacheConfig, context: int, compression: float, layers: int, digests: float = 0.0
) -> CacheConfig:
    """Return `config` with the budget at which reads, dense layers, digests and calibration included, are 1/`compression`.

    A dense layer reads all of its KV; a calibration row reads all keys, half of a layer's KV, every `calibration_interval`
    steps; `digests` is the share of a sparse layer's KV that its digests take, which are read in every step.
    """
    checks.compression(compression)
    dense, interval = sum(map(config.is_dense_layer, range(layers))) / layers, config.calibration_interval
    calibration = 0.5 / interval if interval else 0
    of_a_layer = (1 / compression - dense) / (1 - dense) if dense < 1 else 0
    # The first continuation steps read the least; one token more of context must not cost a block more than planned.
    budget = int(context * (of_a_layer - calibration - digests)) // config.block_size * config.block_size
    if budget < config.smallest_budget:
        raise ConfigError(
            f"got {budget} tokens left for each head of {context}, expected at least {config.smallest_budget}: use a lower "
            "--compression, fewer --dense-layers, or a rarer --calibration-interval"
        )
    return replace(config, budget=budget)
