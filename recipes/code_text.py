"""Cut the program text of the recovery task: `attnpred/assets/code.txt`, and a card beside it.

    python -m recipes.code_text

It is this package's own source as it was at one commit, so that later changes of the package leave what is measured on it
alone.
"""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMIT, CHARACTERS = "7f2725c4a87bc0a9c92f060a98dd115ad8908ec6", 200_000
CARD = """# The program text of the task `recovery`

`code.txt`: the first files of this package's own source, by path, as they were at commit {commit}; {characters:,} characters,
cut at the end of a file. Nothing was trained on it. It is no part of the program; made by `python -m recipes.code_text`.
"""


def git(*words: str) -> str:
    """Return what git says in this checkout."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout


def cut(files: list[str]) -> str:
    """Return whole files, an empty line between, of at most `CHARACTERS` characters together."""
    text = files[0]
    for file in files[1:]:
        if len(text) + 2 + len(file) > CHARACTERS:
            break
        text += "\n\n" + file
    return text


def main() -> None:
    names = git("ls-tree", "-r", "--name-only", COMMIT, "attnpred").split()
    paths = sorted(Path(name) for name in names if name.endswith(".py"))
    text = cut([git("show", f"{COMMIT}:{path.as_posix()}") for path in paths])
    assets = ROOT / "attnpred" / "assets"
    (assets / "code.txt").write_text(text, encoding="utf-8")
    (assets / "code.md").write_text(CARD.format(commit=COMMIT[:7], characters=len(text)), encoding="utf-8")


if __name__ == "__main__":
    main()
