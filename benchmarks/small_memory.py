"""Read and continue a context whose whole cache does not fit: the 1B shape, in chunks, under a limit set with `ulimit -d`.

    python -m benchmarks.small_memory [--context 32768] [--room 0.6] [--offload disk|none]

The process may have no more than the model and the code with it take, and `--room` GiB more (RLIMIT_DATA: all memory that
is not backed by a file). The full cache of 32K tokens is 1 GiB, so `--offload none` ends in an error, which is the control.
The last line is JSON.
"""

import argparse
import ctypes
import json
import resource
import time
from pathlib import Path

import torch

import attnpred
from attnpred.config import CacheConfig
from benchmarks.environment import environment
from benchmarks.models import SHAPE_1B, random_model


def status(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="attnpred bench small_memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=int, default=1 << 15)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--room", type=float, default=0.6, help="GiB above what the model takes")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--offload", choices=("none", "disk"), default="disk")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", action="store_true", help="the last line is JSON in any case")
    args = parser.parse_args(arguments)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    model = random_model(args.layers)
    settings = CacheConfig(budget=1 / 13, late_share=0.05)
    if args.offload == "disk":
        settings = attnpred.hf.make_settings(settings, {"offload": "disk", "offload_dir": args.folder})
    tokens = torch.randint(0, SHAPE_1B.vocab_size, (1, args.context + args.steps))
    full = args.context * args.layers * 8 * 64 * 2 * 2
    with attnpred.attach(model, config=settings) as attached:
        with attached.new_cache() as cache:  # loads all code before the limit is set
            model(tokens[:, : args.chunk], cache=cache, logits_to_keep=1)
        before, limit = status("VmData"), status("VmData") + int(args.room * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        with attached.new_cache() as cache:
            began = time.perf_counter()
            outcome, done = "complete", 0
            try:
                for start in range(0, args.context, args.chunk):
                    model(tokens[:, start : start + args.chunk], cache=cache, logits_to_keep=1)
                    done = start + args.chunk
                    if start // args.chunk % 4 == 3:
                        print(
                            f"{done:,} tokens, {time.perf_counter() - began:.0f} s, {status('VmRSS') / 2**30:.2f} GiB",
                            flush=True,
                        )
                prefill = time.perf_counter() - began
                for i in range(args.context, args.context + args.steps):
                    model(tokens[:, i : i + 1], cache=cache)
                step = (time.perf_counter() - began - prefill) / args.steps
            except (RuntimeError, MemoryError) as error:
                outcome, prefill, step = str(error).splitlines()[0][:120], 0.0, 0.0
            found = {
                "context": args.context,
                "layers": args.layers,
                "offload": args.offload,
                "outcome": outcome,
                "tokens_read": done,
                "full_cache_bytes": full,
                "model_and_code_bytes": before,
                "limit_bytes": limit,
                "room_bytes": limit - before,
                "peak_rss_bytes": status("VmHWM"),
                "fast_bytes": cache.fast_bytes() if outcome == "complete" else None,
                "prefill_s": prefill,
                "ms_per_token": step * 1e3,
            }
    print(f"{outcome}: {done:,} tokens read with {args.room} GiB for a cache of {full / 2**30:.2f} GiB")
    print(json.dumps(found | environment()))


if __name__ == "__main__":
    main()
