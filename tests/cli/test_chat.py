"""`attnpred chat`, and `generate` about a document: answers on stdout, all else on stderr, one line for each mistake."""

import io
import json
import os
import pty
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attnpred.cli import lines
from attnpred.cli.main import main
from attnpred.cli.talk import Talk
from attnpred.config import CacheConfig
from attnpred.hf import attach, load_model, make_policy
from attnpred.serving.answering import Sampling
from attnpred.serving.conversation import Conversation
from attnpred.serving.kept import KeptTexts
from attnpred.serving.reader import Reader

STORY = "The old clock stood in the hall. Nobody had wound it for years, and yet it was never wrong by a minute. " * 40
SPARSE = "--policy quest --budget 96 --num-sink-tokens 16 --recent-window 16 --dense-layers 0".split()
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder for kept files; compiled kernels stay where they are."""
    monkeypatch.setattr("attnpred.serving.kept.user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr("attnpred.cli.lines.user_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def run(home: Path, story: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function: what comes through the pipe, and further arguments, to exit code, stdout, stderr."""

    def command(typed: str, *arguments: str, document: Path | None = story) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        about = [] if document is None else ["--document", str(document)]
        code = main(["chat", "demo", *about, *SPARSE, "--max-new-tokens", "8", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_a_pipe_gets_answers_and_nothing_else(run: Run) -> None:
    code, out, err = run("Who wound it?\n\nWhere did it stand?\n")
    assert code == 0 and len(out.splitlines()) == 2 and out.endswith("\n") and all(out.splitlines())
    assert err.count("the model has no chat template") == 1


@pytest.mark.slow
def test_a_second_start_takes_the_text_from_its_file(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("Who wound it?\n")
    (file,) = (home / "texts").iterdir()
    calls: list[int] = []
    monkeypatch.setattr("attnpred.cli.about_text.Bar.__call__", lambda self, done, total: calls.append(done))
    assert run("Who wound it?\n")[:2] == first[:2] and not calls
    assert list((home / "texts").iterdir()) == [file]
    assert run("Who wound it?\n", "--keep-limit", "0")[1] == first[1] and calls


@pytest.mark.slow
def test_commands_work_in_a_pipe(run: Run) -> None:
    plain = run("Who wound it?\nWhy?\n")[1].splitlines()
    talk = "/stats\nWho wound it?\n/budget 128\n/stats\n/full\n/new\n/policy ema\n/policy\n/help\nWho wound it?\n/quit\nWhy?\n"
    code, out, err = run(talk)
    assert code == 0 and out.splitlines()[0] == plain[0] and len(out.splitlines()) == 3
    for told in (
        "no question so far",
        "times less KV than a full one",
        "last answer, policy quest, budget 96: ",  # as it was made, whatever was chosen since
        "policy ema, budget 128\n",
        "there are full, ",
        "Ctrl-C stops an answer",
    ):
        assert told in err


def test_the_beginning_of_a_document_is_read_where_it_is_wanted(run: Run) -> None:
    code, _, err = run("Who wound it?\n/stats\n", "--max-document-tokens", "600")
    assert code == 0 and "tokens of the document the first 600 are read" in err
    assert 600 < int(err.split(" tokens, policy")[0].split()[-1].replace(",", "")) < 650


def test_without_a_document_it_is_a_conversation(run: Run, home: Path) -> None:
    code, out, _ = run("Who are you?\n", document=None)
    assert code == 0 and out.strip() and not home.exists()


MISTAKES: dict[str, tuple[str, list[str], str]] = {
    "unknown command": ("/nonsense\n", [], "got /nonsense, expected a question, or one of /help, /stats"),
    "unknown policy": ("/policy tarot\n", [], "got policy 'tarot', expected one of full"),
    "budget no number": ("/budget much\n", [], "got budget='much', expected a number of tokens"),
    "budget too small": ("/budget 20\n", [], "got budget=20, expected at least 64"),
    "nothing to ask again": ("/full\n", [], "got no question so far"),
    "surrogate": ("Who \udcff?\n", [], "got a question that is no UTF-8 text"),
    "unknown policy at the start": ("", ["--policy", "tarot"], "got policy 'tarot', expected one of full"),
    "no tokens": ("", ["--max-document-tokens", "0"], "got max_document_tokens=0"),
    "limit below 0": ("", ["--keep-limit", "-1"], "got keep_limit=-1"),
    "no new tokens": ("", ["--max-new-tokens", "0"], "got max_new_tokens=0"),
    "temperature": ("", ["--temperature", "nan"], "got temperature=nan"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, run: Run) -> None:
    typed, arguments, message = MISTAKES[mistake]
    assert_one_line(run(typed, *arguments), message)


def assert_one_line(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    ours = [line for line in err.splitlines() if line.startswith("attnpred: ")]
    assert (code, out) == (2, "") and len(ours) == 1 and err.endswith(ours[0] + "\n")
    assert message in ours[0] and "Traceback" not in err


def test_a_document_that_cannot_be_read_is_one_line(run: Run, tmp_path: Path) -> None:
    empty, binary, long = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "long.txt"
    empty.write_text(" \n", encoding="utf-8")
    binary.write_bytes(bytes(range(256)) * 4)
    long.write_text(STORY * 40, encoding="utf-8")
    assert_one_line(run("Why?\n", document=empty), f"got an empty document in {empty}")
    assert_one_line(run("Why?\n", document=binary), f"got {binary}, which is no text")
    assert_one_line(run("Why?\n", document=tmp_path / "none.txt"), "none.txt (No such file or directory)")
    assert_one_line(run("Why?\n", document=long), "--max-document-tokens")


# generate


def generate(story: Path, question: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    (story.parent / "question.txt").write_text(question, encoding="utf-8")
    file = str(story.parent / "question.txt")
    assert main(["generate", "demo", "--prompt-file", file, *SPARSE, "--max-new-tokens", "8", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_generate_answers_as_chat_does(run: Run, story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run("Who wound it?\n")[1]
    assert generate(story, "Who wound it?\n", capsys, "--document", str(story)) == answer
    result = json.loads(generate(story, "Who wound it?\n", capsys, "--document", str(story), "--json"))
    assert result["text"] == answer.strip() and result["prompt_tokens"] > 512
    assert result["stats"]["total"]["sparse_steps"] == result["stats"]["total"]["steps"] > 0
    assert generate(story, "Who are you?", capsys, "--chat") == run("Who are you?\n", document=None)[1]


# In a terminal


@pytest.fixture
def conversation(tmp_path: Path) -> Iterator[Conversation]:
    model, tokenizer = load_model("demo", device="cpu")
    settings = CacheConfig(budget=96, num_sink_tokens=16, recent_window=16, dense_layers=0)
    quest = make_policy("quest", None, model.config, settings)
    with (
        attach(model, policy=quest, config=settings),
        Conversation(Reader(model, KeptTexts(tmp_path)), tokenizer, STORY, quest, settings, 8192) as opened,
    ):
        yield opened


def test_a_mistake_that_is_typed_is_told_and_the_talk_goes_on(
    conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(conversation, Sampling(8), "quest", None, is_typed=True)
    talk.run(["/policy tarot", "/nonsense", "Who wound it?", "/policy ema", "/full", "/quit", "Why?"])
    out, err = capsys.readouterr()
    assert "got policy 'tarot'" in err and "got /nonsense" in err and "Traceback" not in err
    assert err.startswith(f"{len(conversation.document):,} tokens, policy quest, budget 96; /help")
    assert "8 tokens, cut off, the first after" in err and "[full cache: " in err
    assert "policy quest, budget 96" in out, "the answer that is shown again was not made by ema"
    assert "full cache" in out and talk.last is not None and out.startswith(talk.last.text)


def test_ctrl_c_stops_an_answer_and_not_the_talk(
    conversation: Conversation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one after the token that comes next; a second one at once."""
    before = signal.getsignal(signal.SIGINT)
    presses = iter([1, 2])
    ask = conversation.ask

    def pressed(question: str, sampling: Sampling, say: Any, is_stopped: Callable[[], bool]) -> Any:
        def heard(text: str) -> None:
            say(text)
            for _ in range(next(presses, 0)):
                signal.raise_signal(signal.SIGINT)

        return ask(question, sampling, heard, is_stopped)

    monkeypatch.setattr(conversation, "ask", pressed)
    talk = Talk(conversation, Sampling(8), "quest", None, is_typed=True)
    talk.run(["Who wound it?", "Where did it stand?", "Why?"])
    out, err = capsys.readouterr()
    assert "cut off" in err and "\nstopped\n" in err and signal.getsignal(signal.SIGINT) is before
    assert talk.last is not None and len(talk.last.ids) == 8 and out.endswith(talk.last.text + "\n")


def test_ctrl_c_begins_a_line_anew_and_ctrl_d_ends(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    typed = iter(["Who?", KeyboardInterrupt, "  ", "Why?", EOFError])

    def enter(prompt: str) -> str:
        found = next(typed)
        if not isinstance(found, str):
            raise found
        readline.add_history(found)
        return found

    monkeypatch.setattr("builtins.input", enter)
    assert list(lines.typed()) == ["Who?", "Why?"]
    file = home / "chat_history"
    assert "Why?" in file.read_text(encoding="utf-8") and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@pytest.mark.slow
def test_a_session_in_a_terminal(story: Path, tmp_path: Path) -> None:
    """A prompt, an answer that Ctrl-C stops, another one, and Ctrl-D."""
    ours, theirs = pty.openpty()
    start = (
        "import sys; from pathlib import Path; import attnpred.serving.kept as kept; from attnpred.cli import lines, main\n"
        f"kept.user_cache = lines.user_cache = lambda: Path({str(tmp_path / 'cache')!r})\n"  # compiled kernels stay elsewhere
        "sys.exit(main.main())"
    )
    command = [
        sys.executable,
        "-c",
        start,
        "chat",
        "demo",
        "--document",
        str(story),
        *SPARSE,
        "--max-new-tokens",
        "3000",
    ]
    where = os.environ | {"TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=where) as process:
        os.close(theirs)
        seen = ""

        def until(text: str) -> str:
            nonlocal seen
            limit = time.monotonic() + 240
            while text not in seen:
                assert time.monotonic() < limit, seen
                seen += os.read(ours, 4096).decode(errors="replace")
            before, _, seen = seen.partition(text)
            return before

        until("/help lists the commands")
        until("> ")
        os.write(ours, b"Who wound it?\n")
        until("Who wound it?")
        assert until(" ")  # its first word
        process.send_signal(signal.SIGINT)
        until("cut off")
        until("> ")
        os.write(ours, b"/policy ema\n")
        until("policy ema, budget 96")
        until("> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    os.close(ours)
    assert (tmp_path / "cache" / "chat_history").read_text(encoding="utf-8").count("\n") >= 2
