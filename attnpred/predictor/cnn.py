"""The published forecast network of AttentionPredictor (arXiv 2502.04077), one set of weights for all layers and heads.

Two 3x3 convolutions over the picture "time down, blocks across", a mean over time, and a 1x1 convolution that mixes the
channels into one score per block. It has no size of its own: any number of rows and blocks goes in. The mean over time
is blind to order; recency is seen because the zero padding beyond the last row marks the border.

`UnpaddedCNN` leaves that padding out. A new row then changes no older feature, so a step costs one row of features
instead of five (`attnpred.predictor.incremental`); the price is what it can say about recency, see there.

The 32 channels make the activation 32 times its input, so images are processed a few at a time: at 32 K tokens all 32
heads of a layer at once would need half a gigabyte, in chunks it is the workspace below.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from attnpred.errors import ShapeError
from attnpred.shapes import expect

WORKSPACE_BYTES = 32 * 2**20
"""The 32-channel activation of one chunk stays below this, unless a single image is larger."""

_CHANNELS = (16, 32)


class PaperCNN(nn.Module):
    """Conv2d(1->16) + ReLU, Conv2d(16->32) + ReLU, mean over rows, Conv1d(32->1): 4,833 parameters.

    The names of the layers are those of the authors' checkpoints.
    """

    time_padding: ClassVar[int] = 1
    """Rows of zeros that each 3x3 convolution adds before the oldest and after the newest row."""

    def __init__(self) -> None:
        super().__init__()
        first, second = _CHANNELS
        padding = (self.time_padding, 1)
        self.conv1 = nn.Conv2d(1, first, kernel_size=3, padding=padding, dtype=torch.float32, device="cpu")
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, padding=padding, dtype=torch.float32, device="cpu")
        self.conv3 = nn.Conv1d(second, 1, kernel_size=1, dtype=torch.float32, device="cpu")

    @classmethod
    def averaged(cls, history: int) -> int:
        """Return over how many rows of features the mean goes; `ShapeError` where it would be none."""
        lost = 4 * (1 - cls.time_padding)
        if history <= lost:
            raise ShapeError(f"got {history} history rows, expected at least {lost + 1}: give {cls.__name__} more rows")
        return history - lost

    def forward(self, rows: Tensor) -> Tensor:
        """Return one score per block, [M, C], for images `rows` [M, H, C] (rows in time order, oldest first)."""
        expect("rows", rows, -1, -1, -1)
        self.averaged(rows.shape[1])
        size = self.chunk(rows.shape[1], rows.shape[2])
        if rows.shape[0] <= size:
            return self._score(rows)
        return torch.cat([self._score(part) for part in torch.split(rows, size)])

    @staticmethod
    def chunk(history: int, blocks: int) -> int:
        """Return how many images of `history` x `blocks` fit the workspace, at least 1."""
        image = _CHANNELS[-1] * 4 * history * blocks  # fp32
        return max(1, WORKSPACE_BYTES // max(1, image))

    def _score(self, rows: Tensor) -> Tensor:
        hidden = self.conv1(rows[:, None]).relu_()
        hidden = self.conv2(hidden).relu_()
        scores: Tensor = self.conv3(hidden.mean(dim=2))
        return scores[:, 0]


class UnpaddedCNN(PaperCNN):
    """The same network, with the same names of weights, without zero padding in time; it needs at least 5 rows.

    Recency reaches it only against the oldest four rows. The mean is over windows of five rows, and these are the same
    for every start of a picture that is closed to a circle, its last four rows being its first four. So, whatever the
    weights, what a lone value adds to the score in row j (0 to 3) and what it adds in row H-4+j sum to what it adds
    anywhere between: by how much the newest row counts more than those, by so much row 3 counts below nothing. The
    network can say "new since H rows ago", and anything about changes, wherever they were; it cannot be an average that
    leans on the newest rows.
    """

    time_padding = 0


@torch.no_grad()
def start_as_average(
    network: PaperCNN, history: int, newest: float = 0.2, pair: float = 0.2, mean: float = 0.2
) -> None:
    """Set weights with which the network is `newest` * last row + `pair` * (last two rows) + `mean` * mean of all rows.

    From random weights the published loss hardly finds recency, because only the zero padding beyond the last row shows
    where it is (docs/LOG.md). But a sum over time of differences telescopes: of x_t - x_(t-1) it leaves the last row, of
    x_t - x_(t-2) the last two. A bias of 1 keeps the differences of probabilities above the ReLU, and conv3 takes it off
    again. All other weights become small, and training goes on from there.

    Without padding in time the sums have two ends: of a difference they leave the last row minus row 3, or the last two
    minus rows 2 and 3, and the mean is over rows 4 and later (`UnpaddedCNN` says why there is nothing better).
    """
    averaged, last = network.averaged(history), 2 - network.time_padding  # the kernel row that reaches furthest ahead
    for parameter in network.parameters():
        parameter.mul_(0.05)
    conv1, conv2, conv3 = network.conv1, network.conv2, network.conv3
    assert conv1.bias is not None and conv2.bias is not None and conv3.bias is not None
    value, difference = conv1.weight[0, 0], conv1.weight[1, 0]
    conv1.weight[:2], conv1.bias[:2] = 0.0, torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    value[last, 1] = 1.0
    difference[last, 1], difference[last - 1, 1] = 1.0, -1.0
    conv2.weight[:3], conv2.bias[:3] = 0.0, 0.0
    conv2.weight[0, 0, last, 1] = 1.0
    conv2.weight[1, 1, last, 1] = 1.0
    conv2.weight[2, 1, last, 1] = conv2.weight[2, 1, last - 1, 1] = 1.0
    conv3.weight[0, :3, 0] = torch.tensor([mean, newest * averaged, pair * averaged], dtype=torch.float32, device="cpu")
    conv3.bias[:] = -newest * averaged - pair * (2 * averaged - network.time_padding)  # the zeros have no bias
