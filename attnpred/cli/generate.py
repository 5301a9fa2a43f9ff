"""`attnpred generate`: one completion of a text file, streamed, with a budget."""

from pathlib import Path
from typing import Annotated

import typer

from attnpred.cli.words import layers


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or `demo`.")],
    prompt_file: Annotated[Path, typer.Option(help="Text to continue.")],
    budget: Annotated[
        float, typer.Option(help="Tokens attended per head and layer, or a share of the context up to 1.")
    ] = 1024,
    policy: Annotated[str, typer.Option(help="Which policy chooses (see `attnpred info`).")] = "predicted",
    predictor: Annotated[str | None, typer.Option(help="Folder or Hub id of a predictor of your own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    num_sink_tokens: Annotated[int, typer.Option(help="First tokens, always attended.")] = 64,
    recent_window: Annotated[int, typer.Option(help="Last tokens, always attended.")] = 64,
    block_size: Annotated[int, typer.Option(help="Tokens of a block.")] = 16,
    calibration: Annotated[
        int | None,
        typer.Option(help="A dense row every this many steps; 0: never; left out: what the policy asks for."),
    ] = None,
    dense_layers: Annotated[str, typer.Option(help="How many of the first layers stay dense, or which: 0,1,13.")] = "2",
    offload: Annotated[
        str, typer.Option(help="Where the blocks lie that the budget does not hold: none (in memory), cpu or disk.")
    ] = "none",
    offload_dir: Annotated[
        Path | None, typer.Option(help="Folder of the file; left out: in your own cache folder.")
    ] = None,
    offload_dtype: Annotated[
        str | None, typer.Option(help="Numbers of the blocks there: int8 or fp8; left out: as they are.")
    ] = None,
    late_share: Annotated[
        float | None, typer.Option(help="Most of a selection that may be fetched late, 0 to 1; left out: no limit.")
    ] = None,
    layer_groups: Annotated[
        Path | None,
        typer.Option(help="File of `attnpred analyse-layers`: these layers share the keys of distant tokens."),
    ] = None,
    own_sinks: Annotated[int, typer.Option(help="With --layer-groups: first tokens with keys in every layer.")] = 16,
    own_recent: Annotated[int, typer.Option(help="With --layer-groups: last tokens with keys in every layer.")] = 4080,
    distant_gate: Annotated[
        float | None,
        typer.Option(help="Leave distant tokens out where the others have this share; left out: never (policy pod)."),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Read the prompt in pieces of so many tokens; left out: all at once."),
    ] = None,
    fast_limit: Annotated[int | None, typer.Option(help="Most bytes of fast memory.")] = None,
    host_limit: Annotated[int | None, typer.Option(help="Most bytes of host memory.")] = None,
    disk_limit: Annotated[int | None, typer.Option(help="Most bytes of disk.")] = None,
    strict: Annotated[bool, typer.Option(help="Fail rather than fall back to dense attention.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print what was read, to stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text and counters as one JSON object.")] = False,
) -> None:
    """Continue a text with a small part of its KV cache."""
    import json
    import sys

    import torch
    from tqdm import tqdm

    from attnpred.config import CacheConfig
    from attnpred.errors import ConfigError
    from attnpred.hf import attach, load_model, text_streamer

    if not prompt_file.is_file():
        raise ConfigError(f"got {prompt_file}, expected a text file")
    text = prompt_file.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ConfigError(f"got an empty prompt in {prompt_file}, expected some text")
    settings = CacheConfig(
        budget=int(budget) if budget > 1 and budget.is_integer() else budget,
        block_size=block_size,
        num_sink_tokens=num_sink_tokens,
        recent_window=recent_window,
        calibration_interval=calibration,
        dense_layers=layers(dense_layers),
        late_share=late_share,
        offload=None if offload == "none" else offload,
        offload_dir=offload_dir,
        offload_dtype=offload_dtype,
        fast_limit=fast_limit,
        host_limit=host_limit,
        disk_limit=disk_limit,
        layer_groups=layer_groups,
        own_sinks=own_sinks,
        own_recent=own_recent,
        distant_gate=distant_gate,
        strict=strict,
    )
    lm, tokenizer = load_model(model)
    with attach(lm, policy=policy, config=settings, predictor=predictor) as attached:
        tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(lm.device)
        longest = tokens.shape[1] + max_new_tokens
        if isinstance(settings.budget, int) and settings.budget >= longest:
            tqdm.write(
                f"note: budget {settings.budget} holds all {longest} tokens, so attention is dense", file=sys.stderr
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
