"""`attnpred eval`: one JSON line per row with every promised key; lists of words; a mistake is one line."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnpred.cli.main import main
from attnpred.cli.words import floats, words
from attnpred.errors import ConfigError
from attnpred.evaluation import rows as rows_file

TINY = ["--policies", "ema:rate=0.1,oracle", "--budgets", "0.4,0.6", "--lengths", "170", "--texts", "table,code"]
EDGES = ["--documents", "2", "--steps", "6", "--num-sink-tokens", "16", "--recent-window", "16"]
PROMISED = "model policy budget task length metric value n seed recovery recovery_ratio".split()
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function: arguments after those of `TINY` and `EDGES` to exit code, stdout, stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(["eval", "demo", "--out", str(tmp_path / "rows.jsonl"), *TINY, *EDGES, *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


@pytest.mark.slow
def test_a_row_has_every_promised_key_and_the_figures_agree(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--tasks", "recovery", "--seed", "3", "--json")
    assert code == 0 and "Traceback" not in err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert json.loads(out.splitlines()[-1]) == {"rows": len(rows), "out": str(tmp_path / "rows.jsonl")}
    seen = [(row["policy"], row["budget"], row["text"]) for row in rows]
    assert seen == [(p, b, t) for p in ("ema:rate=0.1", "oracle") for b in (0.4, 0.6) for t in ("table", "code", "all")]
    for row in rows:
        assert set(PROMISED) <= set(row)
        assert (row["model"], row["task"], row["length"], row["seed"]) == ("demo", "recovery", 170, 3)
        assert row["n"] == len(row["documents"]) == (4 if row["text"] == "all" else 2)
        assert row["metric"] == "recovery_ratio" and row["value"] == row["recovery_ratio"]
        assert 0 < row["recovery"] <= 1 + 1e-3 and 0 < row["value"] <= 1 + 1e-3
        assert row["value"] == pytest.approx(sum(row["documents"]) / row["n"])
        assert row["interval"][0] - 1e-6 <= row["value"] <= row["interval"][1] + 1e-6
    for i in range(0, len(rows), 3):  # the last of three is over both kinds of text
        assert rows[i + 2]["documents"] == rows[i]["documents"] + rows[i + 1]["documents"]
        assert rows[i + 2]["recovery"] == pytest.approx((rows[i]["recovery"] + rows[i + 1]["recovery"]) / 2)
    ema, oracle = rows[:6], rows[6:]
    assert all(one["recovery"] < other["recovery"] for one, other in zip(ema, oracle, strict=True))
    assert all(few["recovery"] < many["recovery"] for few, many in zip(oracle[:3], oracle[3:], strict=True))


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown task": (["--tasks", "chess"], "got task 'chess', expected one of facts1"),
    "unknown policy": (["--policies", "ema,tarot"], "got policy 'tarot', expected one of full"),
    "unknown setting": (["--policies", "ema:speed=1"], "got 'speed=1' in policy 'ema:speed=1'"),
    "no policy": (["--policies", " "], "expected at least one of each"),
    "no text": (["--texts", ","], "expected at least one of each"),
    "a word for a budget": (["--budgets", "half"], "got --budgets 'half', expected numbers with commas"),
    "no length": (["--lengths", ""], "got --lengths '', expected numbers with commas"),
    "endless": (["--lengths", "inf"], "got --lengths 'inf', expected numbers with commas"),
    "sinks that are no blocks": (["--num-sink-tokens", "17"], "got num_sink_tokens=17, expected a multiple"),
    "no documents": (["--documents", "0"], "--documents"),
    "no steps": (["--steps", "0"], "--steps"),
    "no task": (["--tasks", ","], "got --tasks ',', expected at least one of facts1"),
    "unknown suite": (["--suite", "slow"], "got --suite 'slow', expected one of quick, full"),
    "half a token": (["--lengths", "170.5"], "got --lengths '170.5', expected whole numbers of tokens"),
    "a file that is missing": (["--tasks", "qa=/no/such"], "there is no '/no/such'"),
    "missing folder": (["--out", "/no/such/rows.jsonl"], "got /no/such/rows.jsonl, expected a file in a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_option_is_one_line_before_the_model_is_read(mistake: str, run: Run, tmp_path: Path) -> None:
    arguments, message = MISTAKES[mistake]
    code, out, err = run(*arguments)
    ours = [line for line in err.splitlines() if line.startswith("attnpred: ")]
    assert (code, out) == (2, "") and len(ours) == 1 and err.endswith(ours[0] + "\n") and message in ours[0]
    assert "Loading" not in err and "Traceback" not in err and not (tmp_path / "rows.jsonl").exists()


LATER: dict[str, tuple[list[str], str]] = {
    "too short for history and steps": (["--lengths", "70"], "got --lengths 70, expected more than 70"),
    "missing text": (
        ["--texts", "/no/such/text"],
        "got /no/such/text (No such file or directory), expected a text file or one of facts",
    ),
    "nothing to replay": (["--policies", "pod"], "got policy 'pod' for task 'recovery', expected one that selects"),
    "a share above one": (["--budgets", "1.5"], "got budget=1.5, expected a share of at most 1.0"),
    "a word where a number belongs": (["--policies", "ema:rate=fast"], "got policy 'ema:rate=fast'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", LATER)
def test_what_only_the_model_can_tell_is_one_line_too(mistake: str, run: Run) -> None:
    arguments, message = LATER[mistake]
    code, out, err = run("--texts", "table", "--documents", "1", *arguments)
    ours = [line for line in err.splitlines() if line.startswith("attnpred: ")]
    assert (code, out) == (2, "") and len(ours) == 1 and message in ours[0] and "Traceback" not in err


def test_a_dry_run_prints_the_cells_and_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "demo", "--suite", "quick", "--budgets", "0.1", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "facts4 at 2048: full with budget 1"
    assert lines[1] == "facts4 at 2048: streaming with budget 0.1"
    assert lines[-1] == f"{len(lines) - 1} cells" and len(lines) - 1 == 3 * 6
    assert main(["eval", "demo"]) == 2
    assert "got no --out, expected a file for the rows" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused_before_the_model_is_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("my notes\n", encoding="utf-8")
    code, _, err = run()
    assert code == 2 and "whose line 1 is no row of attnpred eval" in err and "Loading" not in err
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == "my notes\n"


@pytest.mark.slow
def test_a_cell_that_cannot_be_measured_is_told_and_the_others_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnpred.evaluation.session import PolicySession

    read = PolicySession.read

    def fails(self: PolicySession, tokens: list[int]) -> object:
        if type(self.policy).__name__ == "Oracle":
            raise ConfigError("got bad luck, expected good")
        return read(self, tokens)

    monkeypatch.setattr(PolicySession, "read", fails)
    code, out, err = run("--tasks", "facts1", "--texts", __file__, "--documents", "1", "--lengths", "400", "--json")
    assert code == 1 and "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["rows"] == 3
    assert "left out: facts1 at 400, oracle 0.4: got bad luck, expected good" in err
    assert err.splitlines()[-1] == "attnpred: 2 of 5 cells could not be measured; see above"
    monkeypatch.undo()
    code, out, _ = run("--tasks", "facts1", "--texts", __file__, "--documents", "1", "--lengths", "400", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["rows"] == 5  # only those that were missing


SETTINGS = st.lists(st.sampled_from(["rate=0.1", "late_share=0", "predictor=demo", "budget=0.5"]), max_size=3)
NAMES = st.sampled_from(["ema", "predicted", "oracle", "texts/book.txt"])


@given(st.lists(st.tuples(NAMES, SETTINGS), max_size=5), st.sampled_from([",", " ", ", ", ",\n"]))
def test_a_list_of_words_comes_back(parts: list[tuple[str, list[str]]], comma: str) -> None:
    """A comma inside settings belongs to the word, whatever stands between words."""
    wanted = [name + (":" + ",".join(own) if own else "") for name, own in parts]
    assert words(comma.join(wanted)) == wanted


def test_a_list_of_numbers() -> None:
    assert floats("--budgets", " 0.5, 1e-1 2") == [0.5, 0.1, 2.0]
    with pytest.raises(ConfigError, match="got --budgets '1,x', expected numbers with commas between them"):
        floats("--budgets", "1,x")


@pytest.mark.slow
def test_cells_measured_on_a_full_disk_come_to_stdout(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = rows_file.put

    def full(fd: int, data: bytes) -> None:
        if data not in (b"", b"\n", rows_file.BEGINNING):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(fd, data)

    monkeypatch.setattr(rows_file, "put", full)
    given = ["--policies", "ema", "--texts", "table", "--documents", "1"]
    code, out, err = run(*given)
    *found, last = out.splitlines()
    assert (
        code == 1 and last.endswith("4 rows") and [json.loads(line)["budget"] for line in found] == [0.4, 0.4, 0.6, 0.6]
    )
    assert err.count("cannot be written (No space left on device): rows are kept in memory") == 1
    assert "cannot be written (No space left on device): 4 rows are on stdout instead" in err
    assert not (tmp_path / "rows.jsonl").exists()
    monkeypatch.setattr(rows_file, "put", write)
    (tmp_path / "rows.jsonl").write_text("\n".join(found) + "\n")  # as the user would do
    code, out, err = run(*given)
    assert code == 0 and out.splitlines() == [f"{tmp_path / 'rows.jsonl'}: 4 rows"]
