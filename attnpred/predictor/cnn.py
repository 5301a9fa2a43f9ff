"""The published forecast network of AttentionPredictor (arXiv 2502.04077), one set of weights for all layers and heads.

Two 3x3 convolutions over the picture "time down, blocks across", a mean over time, and a 1x1 convolution that mixes the
channels into one score per block. It has no size of its own: any number of rows and blocks goes in. The mean over time
is blind to order; recency is seen because the zero padding beyond the last row marks the border.

The 32 channels make the activation 32 times its input, so images are processed a few at a time: at 32 K tokens all 32
heads of a layer at once would need half a gigabyte, in chunks it is the workspace below.
"""

import torch
from torch import Tensor, nn

from attnpred.shapes import expect

WORKSPACE_BYTES = 32 * 2**20
"""The 32-channel activation of one chunk stays below this, unless a single image is larger."""

_CHANNELS = (16, 32)


class PaperCNN(nn.Module):
    """Conv2d(1->16) + ReLU, Conv2d(16->32) + ReLU, mean over rows, Conv1d(32->1): 4,833 parameters.

    The names of the layers are those of the authors' checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        first, second = _CHANNELS
        self.conv1 = nn.Conv2d(1, first, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, padding=1)
        self.conv3 = nn.Conv1d(second, 1, kernel_size=1)

    def forward(self, rows: Tensor) -> Tensor:
        """Return one score per block, [M, C], for images `rows` [M, H, C] (rows in time order, oldest first)."""
        expect("rows", rows, -1, -1, -1)
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
