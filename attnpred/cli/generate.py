"""`attnpred generate`: one completion of a text file, streamed, with a budget."""

from pathlib import Path
from typing import Annotated

import typer

from attnpred import checks
from attnpred.cli.options import cache_options
from attnpred.config import CacheConfig


@cache_options()
def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local folder, GGUF file, or a name of `attnpred models`.")
    ],
    prompt_file: Annotated[Path, typer.Option(help="Text to continue.")],
    config: CacheConfig,
    policy: Annotated[str, typer.Option(help="Which policy chooses (see `attnpred info`).")] = "predicted",
    predictor: Annotated[str | None, typer.Option(help="Folder or Hub id of a predictor of your own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(help="Read the prompt in pieces of so many tokens; left out: all at once."),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print what was read, to stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text and counters as one JSON object.")] = False,
) -> None:
    """Continue a text with a small part of its KV cache."""
    import json
    import sys

    import torch
    from tqdm import tqdm

    from attnpred.errors import ConfigError
    from attnpred.hf import attach, load_model, text_streamer

    checks.whole("max_new_tokens", max_new_tokens, 1, checks.TOKENS)
    checks.temperature(temperature)
    checks.seed(seed)
    if prefill_chunk is not None:
        checks.whole("prefill_chunk", prefill_chunk, 1, checks.TOKENS)
    if not prompt_file.is_file():
        raise ConfigError(f"got {prompt_file}, expected a text file")
    text = prompt_file.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ConfigError(f"got an empty prompt in {prompt_file}, expected some text")
    lm, tokenizer = load_model(model)
    with attach(lm, policy=policy, config=config, predictor=predictor) as attached:
        tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(lm.device)
        longest = tokens.shape[1] + max_new_tokens
        if isinstance(config.budget, int) and config.budget >= longest:
            tqdm.write(
                f"note: budget {config.budget} holds all {longest} tokens, so attention is dense", file=sys.stderr
            )
        limit = getattr(lm.config.get_text_config(), "max_position_embeddings", longest)
        if longest > limit:
            tqdm.write(f"note: {longest} tokens are more than the {limit} that {model} was made for", file=sys.stderr)
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        out = lm.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            prefill_chunk_size=prefill_chunk,
            streamer=None if as_json else text_streamer(tokenizer),
            **sampling,
        )
        counters = attached.stats()
    total = counters["total"]
    if "hit_rate" in total:
        total["exposed_wait_ms_per_token"] = total["exposed_wait_ms"] * len(counters["layers"]) / max(1, total["steps"])
    if as_json:
        completion = tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
        print(json.dumps({"prompt_tokens": tokens.shape[1], "text": completion, "stats": counters}))
    if stats:
        print(f"prompt {tokens.shape[1]} tokens, new {out.shape[1] - tokens.shape[1]}", file=sys.stderr)
        for layer in [*counters["layers"], total | {"layer": "all"}]:
            print(
                f"layer {layer['layer']:>3}: attended {layer['tokens_attended']:.0f} of {layer['context_tokens']:.0f} tokens per step, "
                f"read {layer['bytes_read'] + layer['calibration_bytes'] + layer['digest_bytes']:,} of {layer['full_bytes']:,} KV bytes "
                f"({layer['compression']:.1f}x less), dense {layer['dense'] or 'never'}",
                file=sys.stderr,
            )
        print(f"fast memory: {counters['fast_bytes']:,} bytes", file=sys.stderr)
        if "saved_bytes" in counters:
            print(f"keys that layers share: {counters['saved_bytes']:,} bytes are not held", file=sys.stderr)
        if "hit_rate" in total:
            print(
                f"{' and '.join(f'{kind}: {size:,} bytes' for kind, size in counters['slow_bytes'].items())}; "
                f"{total['hit_rate']:.1%} of the selected blocks were there when needed, "
                f"waited {total['exposed_wait_ms_per_token']:.2f} ms per token for the others, "
                f"fetched {total['bytes_fetched']:,} and streamed {total['bytes_streamed']:,} bytes",
                file=sys.stderr,
            )
