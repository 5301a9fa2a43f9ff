"""`Average` sums rows as its two numbers say, starting with the first row as it is."""

import pytest
import torch

from attnpred.predictor.average import Average


@pytest.mark.parametrize(("keep", "gain"), [(0.7, 0.3), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("several", [True, False])
def test_rows_are_summed_up(keep: float, gain: float, several: bool) -> None:
    average, rows = Average(keep, gain, 8), torch.rand(1, 2, 5, 7)
    for part in [rows] if several else rows.split(1, 2):
        average.push(part)
    want = rows[:, :, 0]
    for i in range(1, 5):
        want = keep * want + gain * rows[:, :, i]
    torch.testing.assert_close(average.row.view(), want)


def test_columns_grow_crop_and_are_forgotten() -> None:
    average = Average(1.0, 1.0, 8)
    assert average.is_empty
    average.push(torch.ones(1, 1, 1, 3))
    average.push(torch.ones(1, 1, 2, 90))
    assert average.row.view()[0, 0].tolist() == [3.0] * 3 + [2.0] * 87
    average.crop(2)
    average.push(torch.ones(1, 1, 1, 4))
    assert average.row.view()[0, 0].tolist() == [4.0, 4.0, 1.0, 1.0]
    average.select(torch.tensor([0, 0]))
    average.repeat(2)
    assert average.row.view().shape == (4, 1, 4)
    average.clear()
    average.push(torch.full((1, 1, 1, 2), 5.0))
    assert average.row.view()[0, 0].tolist() == [5.0, 5.0]
