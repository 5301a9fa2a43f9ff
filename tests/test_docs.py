"""Documents that cannot go stale: generated pages are current, and code on pages runs."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from tools import docs_cli, evidence_tables, policy_tables, readme_table, recovery_tables, reliability, speed_tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "docs/howto.md")
SNIPPETS = [
    (page, code)
    for page in PAGES
    for code in re.findall(
        r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
]

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


def test_the_page_of_policies_is_current() -> None:
    assert policy_tables.main(["--check"]) == 0


def test_the_page_of_evidence_is_current() -> None:
    assert evidence_tables.main(["--check"]) == 0


def test_the_page_of_reliability_is_current_and_nothing_in_it_is_wrong() -> None:
    assert reliability.main(["--check"]) == 0


def test_pages_have_code() -> None:
    assert {page for page, _ in SNIPPETS} == set(PAGES)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_code_of_pages_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    page, code = SNIPPETS[number]
    exec(compile(code, f"{page}, {number + 1}", "exec"), {"__name__": "__main__"})


def test_readme_paths_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
