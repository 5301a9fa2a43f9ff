"""`attnpred generate`: one completion of a text file, or one answer to what it asks, streamed, with a budget."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from attnpred import checks
from attnpred.cli.about_text import about_text, compile_kernels, tell
from attnpred.cli.options import DtypeOption, WeightsOption, cache_options
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.reading import read_text


class Completion(NamedTuple):
    """What was generated: tokens of the prompt, new ones, their text, and the counters."""

    prompt: int
    new: int
    text: str
    stats: dict[str, Any]


@cache_options()
def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local folder, GGUF file, or a name of `attnpred models`.")
    ],
    prompt_file: Annotated[Path, typer.Option(help="Text to continue; with --chat or --document, what to ask.")],
    config: CacheConfig,
    chat: Annotated[bool, typer.Option("--chat", help="Put it into the model's chat template, as a question.")] = False,
    document: Annotated[
        Path | None, typer.Option(help="Ask about this text, which is read once and kept, as in `attnpred chat`.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Which policy chooses (see `attnpred info`).")] = "predicted",
    predictor: Annotated[str | None, typer.Option(help="Folder or Hub id of a predictor of your own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = None,
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

    checks.whole("max_new_tokens", max_new_tokens, 1, checks.TOKENS)
    checks.temperature(temperature)
    checks.seed(seed)
    if prefill_chunk is not None:
        checks.whole("prefill_chunk", prefill_chunk, 1, checks.TOKENS)
    text = read_text(prompt_file)
    if not text.strip():
        raise ConfigError(f"got an empty prompt in {prompt_file}, expected some text")
    way = {"policy": policy, "predictor": predictor, "config": config, "weights": weights}
    drawn: dict[str, Any] = {"new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if chat or document is not None:
        done = _answer(
            model, text.strip(), document, way, drawn, dtype=dtype, chunk=prefill_chunk, is_streamed=not as_json
        )
    else:
        done = _continue(model, text, way, **drawn, dtype=dtype, chunk=prefill_chunk, is_streamed=not as_json)
    counters = done.stats
    total = counters["total"]
    if "hit_rate" in total:
        total["exposed_wait_ms_per_token"] = total["exposed_wait_ms"] * len(counters["layers"]) / max(1, total["steps"])
    if as_json:
        print(json.dumps({"prompt_tokens": done.prompt, "text": done.text, "stats": counters}))
    if stats:
        print(f"prompt {done.prompt} tokens, new {done.new}", file=sys.stderr)
        for layer in [*counters["layers"], total | {"layer": "all"}]:
            print(
                f"layer {layer['layer']:>3}: attended {layer['tokens_attended']:.0f} of {layer['context_tokens']:.0f} tokens per step, "
                f"read {layer['bytes_read'] + layer['calibration_bytes'] + layer['digest_bytes']:,} of {layer['full_bytes']:,} KV bytes "
                f"({layer['compression']:.1f}x less), dense {layer['dense'] or 'never'}",
                file=sys.stderr,
            )
        if "weights" in counters:
            packed = counters["weights"]
            left = "".join(f", {count} {name} left" for name, count in packed["left"].items())
            print(
                f"weights: {packed['layers']} layers as {packed['kind']}, {packed['bytes']:,} bytes{left}; "
                f"{packed['compiled']:,} steps of decoder layers compiled, {packed['hooked']:,} stock for a hook's sake",
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


def _answer(
    model: str,
    question: str,
    document: Path | None,
    way: dict[str, Any],
    drawn: dict[str, Any],
    *,
    dtype: str,
    chunk: int | None,
    is_streamed: bool,
) -> Completion:
    """Answer a question, about a document if there is one."""
    from attnpred.serving.answering import Sampling

    def say(text: str) -> None:
        if is_streamed:
            print(text, end="", flush=True)

    with about_text(model, document, dtype=dtype, chunk=chunk, **way) as conversation:
        answer = conversation.ask(question, Sampling(**drawn), say)
        say("\n")
        return Completion(conversation.asked, len(answer.ids), answer.text, answer.stats)


def _continue(
    model: str,
    text: str,
    way: dict[str, Any],
    *,
    new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
    chunk: int | None,
    is_streamed: bool,
) -> Completion:
    """Continue a text."""
    import torch

    from attnpred.hf import attach, load_model, text_streamer

    lm, tokenizer = load_model(model, dtype=dtype)
    compile_kernels(lm.device.type)
    with attach(lm, **way) as attached:
        tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(lm.device)
        longest, budget = tokens.shape[1] + new_tokens, way["config"].budget
        if isinstance(budget, int) and budget >= longest:
            tell(f"note: budget {budget} holds all {longest} tokens, so attention is dense")
        limit = getattr(lm.config.get_text_config(), "max_position_embeddings", longest)
        if longest > limit:
            tell(f"note: {longest} tokens are more than the {limit} that {model} was made for")
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        out = lm.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            prefill_chunk_size=chunk,
            streamer=text_streamer(tokenizer) if is_streamed else None,
            **sampling,
        )
        new = out[0, tokens.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        return Completion(tokens.shape[1], len(new), text, attached.stats())
