"""Blocks of texts: named by all that they depend on, found by the longest beginning, whole or not there."""

import os
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnpred.serving.chain import BLOCK, SMALL, BlockStore, Tensors, chain
from tests.serving.server import wait_for

IDS = list(range(BLOCK * 3 + 7))


def block(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"0.keys": torch.randn(2, BLOCK, 8), "0.values": torch.randn(2, BLOCK, 8)}


SIZE = sum(one.nbytes for one in block(0).values())


def names_of(ids: list[int], root: str = "root") -> list[str]:
    return [part.name for part in chain(root, ids)]


def filled(folder: Path | None, limit: int = 1 << 30, memory: int = 1 << 30) -> tuple[BlockStore, list[str]]:
    store, names = BlockStore(folder, limit, memory), names_of(IDS)
    for number, name in enumerate(names):
        store.put(name, block(number))
    return store, names


def same(found: list[Tensors], wanted: int) -> bool:
    return len(found) == wanted and all(
        torch.equal(one[part], block(number)[part]) for number, one in enumerate(found) for part in one
    )


def test_a_name_stands_for_the_whole_beginning() -> None:
    names = names_of(IDS)
    assert len(names) == len(set(names)) == 3 and names_of(IDS[: 2 * BLOCK + 1]) == names[:2]
    assert not set(names) & set(names_of(IDS, "other")) and names_of(IDS[: SMALL - 1]) == []
    assert not set(names) & set(names_of([5, *IDS[1:]])), "what follows another beginning is another block"
    assert names_of([*IDS[:BLOCK], 5, *IDS[BLOCK + 1 :]])[0] == names[0]


def test_small_blocks_stand_behind_large_ones() -> None:
    parts = chain("root", IDS[: 2 * BLOCK + 3 * SMALL + 5])
    assert [part.stop - part.start for part in parts] == [BLOCK] * 2 + [SMALL] * 3
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]] and parts[0].start == 0
    assert not {part.name for part in parts[2:]} & set(names_of(IDS))


def test_blocks_are_there_after_a_restart_for_their_owner_alone(tmp_path: Path) -> None:
    store, names = filled(tmp_path / "blocks")
    assert same(store.take(names), 3)
    store.close()
    files = list((tmp_path / "blocks").iterdir())
    assert len(files) == 3 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    again = BlockStore(tmp_path / "blocks", 1 << 30, 0)
    assert same(again.take(names), 3) and again.held_bytes == 0
    assert again.take(["0" * 64, *names]) == [] and again.stored_bytes() >= 3 * SIZE
    again.close()


def test_memory_has_a_limit_and_holds_what_was_used_last() -> None:
    store, names = filled(None, memory=2 * SIZE)
    assert store.held_bytes == 2 * SIZE and [store.has(name) for name in names] == [False, True, True]
    store, names = filled(None, memory=3 * SIZE)
    store.take(names)
    store.put("f" * 64, block(9))
    assert [store.has(name) for name in names] == [True, True, False], "the end of a text goes before its beginning"


def test_the_disk_has_a_limit(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "blocks", limit=int(2.5 * SIZE), memory=0)
    store.close()
    again = BlockStore(tmp_path / "blocks", 1 << 30, 0)
    assert again.stored_bytes() < 2.5 * SIZE
    again.close()


@pytest.mark.parametrize("damage", ["a bit", "the end", "all"])
def test_a_damaged_block_is_not_taken(tmp_path: Path, damage: str) -> None:
    store, names = filled(tmp_path / "blocks")
    store.close()
    path = tmp_path / "blocks" / f"{names[1]}.block"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes({"a bit": data, "the end": data[:-100], "all": b""}[damage])
    again = BlockStore(tmp_path / "blocks", 1 << 30, 0)
    assert same(again.take(names), 1) and not path.exists()
    again.close()


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    os.chmod(tmp_path / "blocks", 0o777)  # noqa: PTH101
    store, names = filled(tmp_path / "blocks", memory=0)
    assert store.take(names) == [] and not list((tmp_path / "blocks").iterdir())
    store.close()


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    one, names = filled(tmp_path / "blocks", memory=0)
    other = BlockStore(tmp_path / "blocks", 1 << 30, 0)
    wait_for(lambda: other.has(names[-1]))
    assert same(other.take(names), 3)
    one.close()
    other.close()
