"""`History` equals a list of rows: order, growth by blocks, crop, beams."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.predictor.history import History


def padded(row: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, columns - row.shape[-1]))


@given(
    size=st.integers(1, 6),
    steps=st.lists(
        st.tuples(st.sampled_from(["push", "grow", "crop", "select"]), st.integers(1, 9)), min_size=1, max_size=25
    ),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_a_list_of_rows(size: int, steps: list[tuple[str, int]]) -> None:
    generator = torch.Generator().manual_seed(size)
    history, rows, columns = History(size), [], 3
    for name, number in steps:
        if name in ("push", "grow"):
            columns += number * 4 if name == "grow" else 0
            new = torch.rand(2, 2, number, columns, generator=generator)
            history.push(new)
            rows += list(new.unbind(2))
        elif rows and name == "crop":
            columns = max(1, columns - number)
            history.crop(columns)
            rows = [row[..., :columns] for row in rows]
        elif rows:
            index = torch.tensor([number % 2, 1])
            history.select(index)
            rows = [row[index] for row in rows]
        if rows:
            rows = rows[-size:]
            want = torch.stack(
                [torch.zeros(2, 2, columns)] * (size - len(rows)) + [padded(row, columns) for row in rows], 2
            )
            assert torch.equal(history.ordered(), want)
            assert torch.equal(history.last(), want[:, :, -1])
