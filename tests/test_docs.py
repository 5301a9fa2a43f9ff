"""Documents that cannot go stale: generated pages are current, and code on pages runs."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tools import (
    docs_cli,
    evidence_tables,
    policy_tables,
    readme_table,
    recovery_tables,
    reliability,
    serve_table,
    speed_tables,
)

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "docs/index.md", "docs/howto.md", "docs/write-a-policy.md")
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)

LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


@pytest.mark.skipif(
    f"typer=={version('typer')}" not in LOCK.split(), reason="another typer than the locked one words it differently"
)
def test_cli_reference_is_current() -> None:
    assert docs_cli.main(["--check"]) == 0


def test_readme_table_is_current() -> None:
    assert readme_table.main(["--check"]) == 0


def test_the_tables_of_the_predictor_page_are_current() -> None:
    assert recovery_tables.main(["--check"]) == 0


def test_the_speed_page_is_current() -> None:
    assert speed_tables.main(["--check"]) == 0


def test_the_page_of_the_server_is_current() -> None:
    assert serve_table.main(["--check"]) == 0


def test_the_page_of_policies_is_current() -> None:
    assert policy_tables.main(["--check"]) == 0


def test_the_page_of_evidence_is_current() -> None:
    assert evidence_tables.main(["--check"]) == 0


def test_the_page_of_reliability_is_current_and_nothing_in_it_is_wrong() -> None:
    assert reliability.main(["--check"]) == 0


def run(pieces: list[str], name: str) -> dict[str, object]:
    """Run the pieces of a page one after the other, as a reader would; return the names that they leave."""
    assert pieces
    names: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(pieces, 1):
        exec(compile(code, f"{name}, {number}", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_code_of_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "book.txt").write_text("The storm came over the hills at noon. " * 200, encoding="utf-8")
    code = CODE.findall((ROOT / page).read_text(encoding="utf-8"))
    demo = str(ROOT / "attnpred/assets/demo_lm")  # in place of a model of the Hub, so that no network is needed
    run([piece.replace("HuggingFaceTB/SmolLM2-135M-Instruct", demo) for piece in code], page)


@pytest.mark.slow
def test_the_notebook_runs_and_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    (notebook,) = NOTEBOOKS
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)  # what it prints is the reader's own
    found = run(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"], notebook.name)
    answers, counts = found["answers"], found["counts"]
    assert isinstance(answers, dict) and "4711" in answers["full"]
    assert isinstance(counts, dict) and counts["predicted"]["total"]["compression"] > 12


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert len(pages) > 12
    fetched = re.compile(r"""<(?:link|script|img|iframe)[^>]*(?:src|href)=["']?https?://(?!attnpred)[^>]*>""")
    assert [(path.name, tag) for path, text in pages.items() for tag in fetched.findall(text)] == []
    assert "attnpred.attach" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")


def test_readme_paths_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
