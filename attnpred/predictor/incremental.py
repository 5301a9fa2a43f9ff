"""`IncrementalCNN`: the exact scores of `PaperCNN` or `UnpaddedCNN` for a few rows of convolution per step, not H.

The score of a block is a sum over rows: conv3 is linear, so it can be taken before the mean, and what a row adds is one
number per block, its *contribution*. A contribution depends on five rows and five columns alone. It is kept in a ring
beside the history, so a new row costs

* with padding in time, five rows of convolution: the three newest (the two whose border has moved away, and the new
  one) and the two oldest, which the border has reached;
* without, one: no row inside ever changes.

When `last` moves, only the columns within two of the border, and the new ones, change: those are computed again over
all rows. `scores` finds out by itself what has to be computed; everything is only where the zone begins elsewhere, or
where nearly all rows are new (a prompt).

Memory: as much as the history itself, [B, Hs, H, N] fp32; the 32 channels of features would be 32 times that, 134 MB
per layer at 8 heads, 64 rows and 2,048 blocks. Keeping them as one number is also why features of leaving rows need not
be computed again. The sum over the ring is taken anew in every step: nothing can drift, and a NaN leaves with its row. A
running sum in fp64 would save a tenth of a step without padding (0.4 of 4.1 ms at that size, on one core) and have
neither.

Weights are read at every call and must not change while the state is in use, nor must the network move.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from attnpred.predictor.cnn import WORKSPACE_BYTES, PaperCNN
from attnpred.predictor.history import History
from attnpred.predictor.memory import Columns, Memory
from attnpred.predictor.pretrained import SMALLEST_WIDTH
from attnpred.shapes import expect

CPU_WORKSPACE_BYTES = 2**20
"""On a CPU the features of one call stay below this, unless eight rows of one image are larger: 64 rows of 8 heads at
2,048 blocks take 150 ms, 350 to 430 ms with 2**25 (the second-level cache, and fresh pages); a step hardly depends on it."""

_REACH = 2  # a contribution looks this many rows and columns around


def contributions(network: PaperCNN, rows: Tensor, above: bool, below: bool) -> Tensor:
    """Return what each row adds to the score, [M, R', C], for images `rows` [M, R, C], mean and bias left out.

    `above` and `below` say that the picture ends there, with zero padding. At an end that is no border, two rows are
    context only and get no contribution: R' is R - 4, and two more for each border.
    """
    images, length, _ = rows.shape
    limit = WORKSPACE_BYTES if rows.is_cuda else CPU_WORKSPACE_BYTES
    if 4 * network.conv2.out_channels * rows.numel() > limit:
        if images > 1:
            return torch.cat([contributions(network, part, above, below) for part in rows.chunk(2)])
        if length > 4 * _REACH:
            cut = length // 2
            earlier = contributions(network, rows[:, : cut + _REACH], above, False)
            return torch.cat((earlier, contributions(network, rows[:, cut - _REACH :], False, below)), 1)
    border = (0, 0, int(above), int(below))
    hidden = conv2d(pad(rows, border)[:, None], network.conv1.weight, network.conv1.bias, padding=(0, 1)).relu_()
    hidden = conv2d(pad(hidden, border), network.conv2.weight, network.conv2.bias, padding=(0, 1)).relu_()
    return conv2d(hidden, network.conv3.weight[..., None])[:, 0]


@final
class IncrementalCNN(Memory):
    """A `History` of `size` rows that also scores, for one layer. All tensors are fp32 and lie where the network does.

    Raises `ShapeError` where the network needs more than `size` rows.
    """

    remembers: ClassVar[tuple[str, ...]] = ("first", "last", "known", "pending")

    def __init__(self, network: PaperCNN, size: int) -> None:
        self.network, self.size = network, size
        self.rows = size
        self.averaged = network.averaged(size)
        self.history = History(size)
        self.contributions = Columns(before=(size,))  # each in the place of its row in the history
        self.rebuilds = 0  # how often everything was computed
        self.clear()

    def tables(self) -> Sequence[Columns]:
        return (self.contributions,)

    def parts(self) -> Mapping[str, Memory]:
        return {"history": self.history}

    @property
    def is_empty(self) -> bool:
        return self.history.is_empty

    def clear(self) -> None:
        super().clear()
        self.first = self.last = 0  # of the contributions
        self.known = 0  # of these, the columns from here on are stale
        self.pending = 0  # rows pushed since they were computed

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        """Append rows [B, Hs, R, N], oldest first; older rows read as zero in columns they never had."""
        self.history.push(rows.to(self.network.conv1.weight.device))
        self.pending += rows.shape[2]

    def crop(self, columns: int) -> None:
        super().crop(columns)
        self.known = min(self.known, columns - _REACH)

    def ordered(self) -> Tensor:
        """Return the rows, [B, Hs, H, N], oldest first."""
        return self.history.ordered()

    @torch.no_grad()
    def scores(self, first: int, last: int) -> Tensor:
        """Return the network's scores of `ordered()[..., first:last]`, [B, Hs, last - first]; ones if that is too narrow.

        Columns that were never seen read as zero. `ShapeError` before the first row.
        """
        rows = self.history.ring.data
        expect("rows", rows, -1, -1, -1, -1)
        batch, heads = rows.shape[:2]
        if last - first < SMALLEST_WIDTH:
            return rows.new_ones(batch, heads, last - first)
        known = self.known
        if last != self.last:  # the border of zeros was there, and is here now
            known = min(known, self.last - _REACH, last - _REACH)
        newest = self.size - _REACH - self.pending  # the oldest row whose contribution a pushed row changes
        rebuild = first != self.first or known <= first or newest <= _REACH
        self.first, self.last, self.known = first, last, 0  # if interrupted: everything is stale
        if rebuild:
            self.rebuilds += 1
            self.contributions.clear()
            known = first
        ring = self.contributions.reserve(batch, heads, last, rows.device)
        if self.pending and not rebuild:
            ends = self._places(-_REACH, _REACH)
            self.contributions.data[:, :, ends] = 0.0  # without padding these rows have none
            self._compute(0, _REACH, first, last)
            self._compute(newest, self.size, first, last)
        self._compute(0, self.size, known, last)
        self.known, self.pending = last, 0
        assert self.network.conv3.bias is not None
        return ring[..., first:].sum(2) / self.averaged + self.network.conv3.bias

    def _places(self, begin: int, end: int) -> Tensor:
        """Return where rows [begin, end), counted from the oldest, lie in the rings; -1 is the newest."""
        return (self.history.cursor + torch.arange(begin, end, device=self.history.ring.data.device)) % self.size

    def _compute(self, begin: int, end: int, left: int, right: int) -> None:
        """Renew the contributions of rows [begin, end), counted from the oldest, in columns [left, right) of the zone.

        `right` is its end; on the left the convolutions see two columns more, or the border.
        """
        padded = self.network.time_padding == 1
        if not padded:
            begin, end = max(begin, _REACH), min(end, self.size - _REACH)
        if begin >= end or left >= right:
            return
        start = max(self.first, left - _REACH)
        places = self._places(max(0, begin - _REACH), min(self.size, end + _REACH))
        picture = self.history.ring.data[:, :, places, start:right]
        if picture.shape[3] < right - start:
            picture = pad(picture, (0, right - start - picture.shape[3]))
        above, below = padded and begin == 0, padded and end == self.size
        added = contributions(self.network, picture.flatten(0, 1), above, below)[..., left - start :]
        self.contributions.data[:, :, self._places(begin, end), left:right] = added.unflatten(0, picture.shape[:2])
