"""Write docs/cli.md from the commands' own help, so that the reference cannot say anything else.

`python -m tools.docs_cli` writes it; `--check` only says (exit code 1) when it is out of date.
"""

import sys
from pathlib import Path

from typer.testing import CliRunner

from attnpred.cli.main import COMMANDS, build

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = "# Command line\n\nWritten by `make docs` from the commands' own help. Do not edit.\n"


def help_of(*command: str) -> str:
    """Return what `attnpred COMMAND --help` prints in a terminal of 80 columns."""
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})
    result = runner.invoke(build(), [*command, "--help"], prog_name="attnpred", catch_exceptions=False)
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def page() -> str:
    """Return the whole page."""
    parts = [HEAD, f"```text\n{help_of()}\n```\n"]
    parts += [f"## attnpred {name}\n\n```text\n{help_of(name)}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Write or check the page; return the exit code."""
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/cli.md is out of date: run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
