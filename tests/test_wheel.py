"""The wheel and the sdist hold what a user needs: installed apart from the repository, the demo model answers."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from tools import test_install

pytestmark = pytest.mark.slow


def test_every_extra_is_tried_by_make_test_install() -> None:
    text = (test_install.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M)
    assert set(test_install.EXTRAS) == set(extras) - {"dev", "gpu"}  # one is for this repository, one needs a GPU


def test_the_wheel_and_the_sdist_work_away_from_the_repository(tmp_path: Path) -> None:
    sdist, wheel = test_install.build(tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "requirements.lock", "mkdocs.yml", "tests/test_wheel.py", "docs/index.md"} <= names
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    shared = (
        tmp_path / "shared"
    )  # the packages of this Python, but for attnpred and for what would be compiled at first
    shared.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"(_*attnpred|numba|llvmlite)|.*\.pth$", package.name):
            (shared / package.name).symlink_to(package)
    (own / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin" / "python"),
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, "--quiet", "--disable-pip-version-check", "--ignore-installed", str(wheel)], check=True)
    used = f"{test_install.USE}\nimport pathlib\nassert pathlib.Path(attnpred.__file__).is_relative_to({str(own)!r})"
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for command in (
        [str(folder / "bin" / "python"), "-c", used],
        [str(folder / "bin" / "attnpred"), "info", "policies"],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
