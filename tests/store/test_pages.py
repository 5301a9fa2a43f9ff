"""Huge pages are asked for inside a tensor alone, and change nothing that it says."""

import pytest
import torch

from attnpred.store import pages
from attnpred.store.pages import HUGE_PAGE, ask_for_huge_pages
from attnpred.store.pool import BlockPool


def test_asks_for_whole_pages_inside_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda address, size, advice: asked.append((address, size)) or 0)
    tensor = torch.empty(3 * HUGE_PAGE + 5000, dtype=torch.uint8)
    assert ask_for_huge_pages(tensor)
    ((address, size),) = asked
    assert address % HUGE_PAGE == 0 and size % HUGE_PAGE == 0 and size >= 2 * HUGE_PAGE
    assert tensor.data_ptr() <= address and address + size <= tensor.data_ptr() + tensor.numel()
    assert not ask_for_huge_pages(torch.empty(1000)) and len(asked) == 1  # no whole page in it
    assert not ask_for_huge_pages(torch.empty(9, device="meta"))


def test_nothing_happens_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    assert not ask_for_huge_pages(torch.empty(3 * HUGE_PAGE, dtype=torch.uint8))


def test_a_pool_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr("attnpred.store.pool.ask_for_huge_pages", asked.append)
    pool = BlockPool(16)
    keys = torch.randn(1, 2, 100, 16)
    pool.append(keys, -keys)
    assert [tensor.data_ptr() for tensor in asked] == [pool.keys.data_ptr(), pool.values.data_ptr()]
    assert torch.equal(pool.view()[0], keys) and torch.equal(pool.view()[1], -keys)
