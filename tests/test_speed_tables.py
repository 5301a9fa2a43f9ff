"""The speed page says what was measured, and nothing of what was not."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools import speed_tables
from tools.speed_targets import number, targets

RATIO = {"shape": "1b", "dtype": "bfloat16"}
DECODE: dict[str, Any] = {
    "rows": [
        RATIO | {"context": 4096, "layers": 16, "variant": "floor", "ms_per_token": 100.0},
        RATIO | {"context": 4096, "layers": 16, "variant": "predicted", "ms_per_token": 105.5},
        RATIO | {"context": 32768, "layers": 16, "variant": "predicted", "ms_per_token": 111.0},
    ],
    "ratios": [
        RATIO
        | {
            "context": 4096,
            "predicted_over_floor": 1.055,
            "best_dense_over_predicted": 0.99,
            "fits_over_packed": 1.013,
        },
        RATIO | {"context": 32768, "best_dense_over_predicted": 1.4, "transformers_over_predicted": 9.04},
    ],
    "growth": [RATIO | {"variant": "predicted", "contexts": [4096, 32768], "growth": 1.052}],
    "budget": 1024,
    "threads": 2,
    "first_token_s": {"cold": 9.3, "warm": 5.6, "torch": 4.5},
}
CALL = {"shape": "8b", "dtype": "bfloat16", "context": 131072}
ATTENTION: dict[str, Any] = {
    "rows": [
        CALL | {"variant": "packed", "us": 40000.0, "limit_us": 11000.0},
        CALL | {"variant": "dense", "us": 20000.0, "limit_us": 11000.0},
        CALL | {"variant": "sparse-torch", "budget": 1024, "us": 900.0, "limit_us": 250.0},
        CALL | {"variant": "sparse-numba", "budget": 1024, "us": 400.0, "limit_us": 250.0},
        CALL | {"variant": "sparse-numba", "budget": 512, "us": 1.0, "limit_us": 1.0},
    ],
    "threads": 2,
}
BATCHES: dict[str, Any] = {
    "rows": [
        {"batch": 4, "kind": "shared", "variant": name, "context": 8192, "layers": 8, "budget": 1024}
        | {"tokens_held": 32768, "tokens_per_s": speed}
        for name, speed in (("packed", 17.25), ("predicted", 123.4))
    ],
    "shape": "1b",
    "dtype": "bfloat16",
    "threads": 2,
}


def test_targets_show_what_was_measured() -> None:
    lines = {line[0]: line[2] for line in targets({"decode": DECODE, "attention": ATTENTION})}
    assert lines["1B bf16 step over its floor, 16K / 32K / 64K"] == "- / - / -"
    assert lines["growth of that step, 4,096 to 32,768 tokens"] == "1.05"
    assert lines["transformers' default over that step, 32K"] == "9.04"
    assert lines["the strongest dense path over that step, 32K / 64K"] == "1.40 / -"
    assert lines["the strongest dense path over `predicted`, at worst"] == "0.99 (1b, 4,096 tokens)"
    assert lines["attaching when the context fits the budget, over `packed`"] == "1.01 at 4,096 tokens"
    assert lines["first token with compiled kernels at hand, over plain torch"] == "+1.10 s"
    assert lines["sparse call, 8B bf16 128K, over the limit of random blocks"] == "1.60"
    assert lines["the best dense call over that call"] == "50.0"
    assert targets({}) == []


def test_a_missing_file_leaves_its_section_out(tmp_path: Path) -> None:
    assert speed_tables.page(tmp_path) == speed_tables.HEAD
    (tmp_path / "attention.json").write_text(json.dumps(ATTENTION))
    (tmp_path / "batches.json").write_text(json.dumps(BATCHES))
    page = speed_tables.page(tmp_path)
    assert "## A decode step" not in page
    assert "| 131,072 | 40,000 | 20,000 | 900 | 400 | 11,000 | 250 |" in page
    assert "| 4, shared | 32,768 | 17.2 | 123 |" in page


def test_a_page_out_of_date_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(speed_tables, "PAGE", tmp_path / "speed.md")
    assert speed_tables.main([]) == speed_tables.main(["--check"]) == 0
    (tmp_path / "decode.json").write_text(json.dumps(DECODE))
    assert speed_tables.main(["--check"]) == 1
    assert speed_tables.main([]) == speed_tables.main(["--check"]) == 0
    assert "| 4,096 | 100 | 106 | 1.05 | 0.99 | - |" in (tmp_path / "speed.md").read_text()


def test_figures_have_three_digits() -> None:
    assert [number(x) for x in (1.234, 12.34, 1234.5, None)] == ["1.23", "12.3", "1,234", "-"]


def test_rivals_come_first_and_what_was_not_run_is_a_dash(tmp_path: Path) -> None:
    row = {"model": "smollm2", "kv": "f16", "load": [1.0, 2.0]}
    found = [
        row | {"context": context, "engine": engine, "weights": "Q8_0", "ms_per_token": ms, "prompt_ms": 2500.0}
        for context, engine, ms in ((1024, "llama.cpp", 18.4), (4096, "llama.cpp", 39.2), (1024, "attnpred", 25.0))
    ]
    (tmp_path / "rivals.json").write_text(json.dumps({"rows": found, "threads": 2}), encoding="utf-8")
    (tmp_path / "decode.json").write_text(json.dumps(DECODE), encoding="utf-8")
    page = speed_tables.page(tmp_path)
    assert "16K | at least 1.0 / 1.5 / 2.5 / 4 | - / - / - / - |" in page
    assert page.index("## Beside llama.cpp") < page.index("## Wanted and reached") < page.index("## A decode step")
    assert "| llama.cpp, Q8_0, f16 | 18.4 (2.50) | 39.2 (2.50) |" in page
    assert "| attnpred, Q8_0, f16 | 25.0 (2.50) | - |" in page


def test_the_better_of_a_rival_is_compared_with() -> None:
    rows = [
        {"engine": engine, "weights": weights, "kv": kv, "context": context, "ms_per_token": ms}
        for engine, weights, kv, context, ms in (
            ("llama.cpp", "Q8_0", "f16", 4096, 60.0),
            ("llama.cpp", "Q8_0", "q8_0", 4096, 50.0),
            ("attnpred", "int8", "fp32", 4096, 25.0),
            ("attnpred", "int8", "fp32", 1024, 24.0),
            ("attnpred", "int8", "fp32", 16384, 27.0),
        )
    ]
    lines = {line[0]: line[2] for line in targets({"rivals": {"rows": rows}})}
    assert next(reached for what, reached in lines.items() if "Q8_0" in what) == "- / 2.00 / - / -"
    assert lines["growth of the token in int8, 1K to 16K"] == "1.12"


def test_products_and_losses_have_their_tables(tmp_path: Path) -> None:
    matrix = {"rows": 576, "width": 1536, "vectors": 1}
    cells = [matrix | {"variant": "int8", "gb_per_s": 16.2, "share": 0.845, "bytes": 1 << 20}]
    cells.append(matrix | {"variant": "int8", "vectors": 4, "gb_per_s": 1.0, "share": 0.1, "bytes": 1 << 20})
    (tmp_path / "linear.json").write_text(json.dumps({"rows": cells, "threads": 2, "load": 0.5}), encoding="utf-8")
    lost = {"model": "demo", "weights": "int4", "bits_per_byte": 1.62704, "kl": 0.011, "same": 0.9105}
    made = {"rows": [lost], "windows": 8, "window_tokens": 512, "threads": 2}
    (tmp_path / "weights.json").write_text(json.dumps(made), encoding="utf-8")
    page = speed_tables.page(tmp_path)
    assert "| 576 x 1,536 | 16.2 (84%) |" in page or "| 576 x 1,536 | 16.2 (85%) |" in page
    assert "| demo | int4 | 1.6270 | 0.011 | 91.0% |" in page or "| demo | int4 | 1.6270 | 0.011 | 91.1% |" in page
