"""The parts that all answers on the wire have in common: usage, timings, probabilities, what was read."""

from typing import Any

from attnpred.serving.drawing import Chance, Drawn
from attnpred.serving.job import Done, Ended, Said
from attnpred.serving.prompts import Prompt


def usage(done: Done) -> dict[str, Any]:
    """Return OpenAI's `usage`."""
    return {
        "prompt_tokens": done.prompt,
        "completion_tokens": done.new,
        "total_tokens": done.prompt + done.new,
        "prompt_tokens_details": {"cached_tokens": done.reused},
    }


def timings(done: Done) -> dict[str, Any]:
    """Return what llama.cpp's server calls so; milliseconds."""
    computed = done.prompt - done.reused
    return {
        "cache_n": done.reused,
        "prompt_n": computed,
        "prompt_ms": round(done.prompt_ms, 3),
        "prompt_per_token_ms": round(done.prompt_ms / max(1, computed), 3),
        "prompt_per_second": round(1e3 * computed / max(1e-3, done.prompt_ms), 3),
        "predicted_n": done.new,
        "predicted_ms": round(done.new_ms, 3),
        "predicted_per_token_ms": round(done.new_ms / max(1, done.new), 3),
        "predicted_per_second": round(1e3 * done.new / max(1e-3, done.new_ms), 3),
        "queued_ms": round(done.waited_ms, 3),
    }


def counters(ended: Ended) -> dict[str, Any]:
    """Return what an answer has read of its cache: bytes of a step and of the full cache, hits, fast memory."""
    stats = ended.stats
    total = stats["total"]
    steps = max(1, total.get("steps", 0) or 0)
    layers = max(1, len(stats["layers"]))
    read = total["bytes_read"] + total["calibration_bytes"] + total["digest_bytes"]
    return {
        "kv_bytes_per_token": round(read * layers / steps),
        "full_kv_bytes_per_token": round(total["full_bytes"] * layers / steps),
        "tokens_attended": round(total["tokens_attended"], 1),
        "context_tokens": round(total["context_tokens"], 1),
        "compression": round(total["compression"], 2),
        "hit_rate": total.get("hit_rate"),
        "fast_bytes": stats["fast_bytes"],
    }


def probabilities(tokenizer: Any, drawn: Drawn) -> dict[str, Any]:
    """Return one token of a chat's `logprobs`."""
    assert drawn.chance is not None
    return _chance(tokenizer, drawn.chance) | {"top_logprobs": [_chance(tokenizer, one) for one in drawn.alternatives]}


def piece(tokenizer: Any, token: int) -> str:
    """Return the text of one token."""
    return str(tokenizer.decode([token]))


def _chance(tokenizer: Any, chance: Chance) -> dict[str, Any]:
    text = piece(tokenizer, chance.token)
    return {"token": text, "logprob": max(-9999.0, chance.logprob), "bytes": list(text.encode())}


def looks(prompt: Prompt, said: Said) -> dict[str, Any] | None:
    """Return what the tokens of `said` were read from: passages of documents, [document, first, last letter, weight]."""
    found: dict[tuple[str, int, int], float] = {}
    shares = []
    for look in said.looks:
        if look is None:
            continue
        shares.append(look.share)
        for passage in look.passages:
            letters = prompt.letters(passage.start, passage.stop)
            if letters is not None:
                found[letters] = max(found.get(letters, 0.0), passage.weight)
    if not shares:
        return None
    heaviest = sorted(found.items(), key=lambda item: -item[1])
    return {
        "passages": [[*place, round(weight, 4)] for place, weight in heaviest],
        "share": round(sum(shares) / len(shares), 4),
    }
