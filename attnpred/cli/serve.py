"""`attnpred serve`: an OpenAI-compatible server for one model, and a page that shows what it reads (extra `serve`)."""

from pathlib import Path
from typing import Annotated

import typer

from attnpred import checks
from attnpred.cli.options import DtypeOption, WeightsOption, cache_options
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError, MissingExtraError, missing_extra

LOCAL = ("127.0.0.1", "::1", "localhost")
"""Addresses that only this machine reaches."""
SHORTEST = 16
"""Letters of a key."""


@cache_options()
def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local folder, GGUF file, or a name of `attnpred models`.")
    ],
    config: CacheConfig,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes any that is free.")] = 8642,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; left out: as it is given here.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Which policy chooses, if a request names none.")] = "predicted",
    predictor: Annotated[str | None, typer.Option(help="Folder or Hub id of a predictor of your own.")] = None,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Keys that clients must have, a line each; each has documents of its own.")
    ] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Listen at an address that others reach, without any key.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name by which clients may call this server.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where documents and what was read are kept; left out: your cache folder.")
    ] = None,
    keep_limit: Annotated[int, typer.Option(help="Most bytes of what was read, on disk; 0 keeps none.")] = 8 << 30,
    block_memory: Annotated[
        int,
        typer.Option(
            help="Most bytes of what was read, in memory: of blocks, and of documents as policies have read them."
        ),
    ] = 1 << 30,
    memory_limit: Annotated[
        int | None,
        typer.Option(help="Most bytes of the caches of all requests; left out: three quarters of what is free."),
    ] = None,
    streams: Annotated[int, typer.Option(help="Most requests that are answered at a time.")] = 64,
    queue: Annotated[int, typer.Option(help="Most requests that wait; the next one is refused (429).")] = 64,
    seconds: Annotated[float, typer.Option(help="Most seconds of a request.")] = 600.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer for which nobody says how many.")] = 1024,
    body_limit: Annotated[int, typer.Option(help="Most bytes of a request.")] = 64 << 20,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what is asked into the log too.")] = False,
) -> None:
    """Serve a model as OpenAI's API, with documents that are read once, and a page that shows what is read."""
    import os

    for label, value, least, most in (
        ("port", port, 0, 65535),
        ("keep_limit", keep_limit, 0, checks.BYTES),
        ("block_memory", block_memory, 0, checks.BYTES),
        ("memory_limit", memory_limit, 1, checks.BYTES),
        ("streams", streams, 1, 1024),
        ("queue", queue, 1, 65536),
        ("max_tokens", max_tokens, 1, checks.TOKENS),
        ("body_limit", body_limit, 1, 1 << 32),
    ):
        if value is not None:
            checks.whole(label, value, least, most)
    if not checks.is_finite(seconds) or not 0 < seconds <= 1_000_000:
        raise ConfigError(f"got seconds={checks.shown(seconds)}, expected more than 0, and at most 1,000,000")
    keys = _keys(key_file, os.environ.get("ATTNPRED_API_KEY"))
    if host not in LOCAL and not keys and not without_key:
        raise ConfigError(
            f"got host {host!r} without a key, expected one: give --key-file (or ATTNPRED_API_KEY), or say --without-key"
        )
    try:
        from attnpred.serving.web.running import run
    except MissingExtraError:
        raise
    except ImportError as error:
        raise missing_extra(error.name or "fastapi", "serve") from None
    from attnpred.serving.service import Plan, Service
    from attnpred.serving.web.guard import Rules

    known = {*LOCAL, host, *(allow_host or ())}
    anywhere = host in ("0.0.0.0", "::") and not allow_host
    plan = Plan(
        model=model,
        alias=name,
        policy=policy,
        predictor=predictor,
        settings=config,
        dtype=dtype,
        weights=weights,
        folder=folder or Service.usual_folder(),
        keep_limit=keep_limit,
        block_memory=block_memory,
        memory_limit=memory_limit,
        streams=streams,
        waiting=queue,
        seconds=seconds,
        tokens=max_tokens,
        logs_prompts=log_prompts,
    )
    rules = Rules(None if anywhere else frozenset(one.lower() for one in known), keys, body_limit, seconds + 60)
    run(plan, rules, host, port)


def _keys(file: Path | None, given: str | None) -> list[str]:
    """Return the keys of a file and of the environment. Raises `ConfigError`."""
    from attnpred.reading import read_text

    lines = [] if file is None else [line.strip() for line in read_text(file, "a file of keys", 1 << 20).splitlines()]
    keys = [line for line in lines if line] + ([given] if given else [])
    if file is not None and not any(lines):
        raise ConfigError(f"got no key in {file}, expected one on each line")
    if short := next((key for key in keys if len(key) < SHORTEST), None):
        raise ConfigError(
            f"got a key of {len(short)} letters, expected at least {SHORTEST}: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return keys
