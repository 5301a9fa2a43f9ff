"""Many small reads give the bytes of the file, natively and in Python, however they are merged."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.errors import StoreError
from attnpred.store import positioned
from attnpred.store.positioned import read_many

SIZE = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "data"
    path.write_bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8).numpy().tobytes())
    return path


def check(file: Path, places: list[int], size: int) -> None:
    data, into = file.read_bytes(), torch.full((len(places), size), 255, dtype=torch.uint8)
    fd = os.open(file, os.O_RDONLY)
    try:
        read_many(fd, torch.tensor(places), into, str(file))
    finally:
        os.close(fd)
    assert [bytes(row.tolist()) for row in into] == [data[place : place + size] for place in places]


@pytest.mark.parametrize("native", [True, False])
@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.sampled_from([0, 0, 1, 100, 16 << 10, (16 << 10) + 1, 40_000]), min_size=1, max_size=12),
    size=st.sampled_from([1, 8, 264, 4096, 30_000]),
    twice=st.booleans(),
)
def test_pieces_are_those_of_the_file(native: bool, gaps: list[int], size: int, twice: bool, file: Path) -> None:
    places, place = [], 0
    for gap in gaps:
        place += gap
        places += [place] * (2 if twice else 1)  # two rows of a batch may share a block
        place += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positioned, "_HAS_NUMBA", native and positioned._HAS_NUMBA)
        check(file, places, size)


@pytest.mark.parametrize("native", [True, False])
def test_the_end_of_the_file_is_an_error_that_names_it(native: bool, file: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positioned, "_HAS_NUMBA", native and positioned._HAS_NUMBA)
        with pytest.raises(StoreError, match=rf"got the end of {file} at byte {SIZE}, expected more"):
            check(file, [0, SIZE - 4096, SIZE - 10], 4096)
