"""The network against the paper's description, written out in loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.errors import ShapeError
from attnpred.predictor import cnn
from attnpred.predictor.cnn import PaperCNN, start_as_average

Grid = list[list[float]]


def convolve(planes: list[Grid], weight: list[list[Grid]], bias: list[float]) -> list[Grid]:
    """A 3x3 convolution with a border of zeros, then ReLU: planes [in][H][C], weight [out][in][3][3]."""
    height, width = len(planes[0]), len(planes[0][0])
    result = []
    for kernels, start in zip(weight, bias, strict=True):
        plane = [[start] * width for _ in range(height)]
        for y in range(height):
            for x in range(width):
                for source, kernel in zip(planes, kernels, strict=True):
                    for dy in (-1, 0, 1):
                        for dx in (-1, 0, 1):
                            if 0 <= y + dy < height and 0 <= x + dx < width:
                                plane[y][x] += kernel[dy + 1][dx + 1] * source[y + dy][x + dx]
                plane[y][x] = max(0.0, plane[y][x])
        result.append(plane)
    return result


def described(network: PaperCNN, image: Grid) -> list[float]:
    """Scores of one image [H][C], from the description in arXiv 2502.04077."""
    w = {name: tensor.double().tolist() for name, tensor in network.state_dict().items()}
    planes = convolve([image], w["conv1.weight"], w["conv1.bias"])
    planes = convolve(planes, w["conv2.weight"], w["conv2.bias"])
    scores = []
    for x in range(len(image[0])):
        means = [sum(row[x] for row in plane) / len(plane) for plane in planes]
        mixed = sum(weight[0] * mean for weight, mean in zip(w["conv3.weight"][0], means, strict=True))
        scores.append(w["conv3.bias"][0] + mixed)
    return scores


def network(seed: int = 0) -> PaperCNN:
    torch.manual_seed(seed)
    return PaperCNN()


@pytest.mark.parametrize(("history", "blocks"), [(1, 1), (1, 4), (3, 1), (4, 3), (2, 5)])
def test_is_what_the_paper_describes(history: int, blocks: int) -> None:
    net, rows = network(), torch.rand(2, history, blocks)
    expected = torch.tensor([described(net, image.double().tolist()) for image in rows])
    torch.testing.assert_close(net(rows), expected, atol=1e-6, rtol=1e-5)


def test_has_the_published_parameters() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in network().state_dict().items()}
    assert shapes == {
        "conv1.weight": (16, 1, 3, 3),
        "conv1.bias": (16,),
        "conv2.weight": (32, 16, 3, 3),
        "conv2.bias": (32,),
        "conv3.weight": (1, 32, 1),
        "conv3.bias": (1,),
    }
    assert sum(parameter.numel() for parameter in network().parameters()) == 4833


@settings(deadline=None, max_examples=25)
@given(images=st.integers(1, 7), history=st.integers(1, 9), blocks=st.integers(1, 12), fit=st.integers(1, 7))
def test_chunks_change_nothing(images: int, history: int, blocks: int, fit: int) -> None:
    net, rows = network(), torch.rand(images, history, blocks)
    whole = net(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cnn, "WORKSPACE_BYTES", fit * 32 * 4 * history * blocks)
        assert PaperCNN.chunk(history, blocks) == fit
        torch.testing.assert_close(net(rows), whole, atol=1e-6, rtol=1e-5)


def test_no_chunk_is_larger_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = network(), []
    net.conv2.register_forward_hook(lambda _, __, output: seen.append(output.numel() * 4))
    with torch.no_grad():
        assert net(torch.rand(40, 64, 256)).shape == (40, 256)  # 84 MB at once
    assert len(seen) == 3 and max(seen) <= cnn.WORKSPACE_BYTES
    assert PaperCNN.chunk(64, 10**6) == 1  # one image always goes through


def test_recency_comes_from_the_border_alone() -> None:
    """An impulse scores the same wherever it is inside, and otherwise near the last row."""
    net, history = network(3), 16
    impulses = torch.zeros(history, history, 9)
    impulses[torch.arange(history), torch.arange(history), 4] = 1.0  # image i: row i
    scores = net(impulses)[:, 4]
    inside = scores[3 : history - 3]  # two 3x3 convolutions: further than this the border is not felt
    torch.testing.assert_close(inside, inside[:1].expand_as(inside), atol=1e-6, rtol=1e-5)
    assert (scores[-1] - inside[0]).abs() > 1e-4
    assert (scores[0] - scores[-1]).abs() > 1e-4


def test_another_number_of_dimensions_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"got rows of shape \(4, 5\), expected \[any, any, any\]"):
        network()(torch.rand(4, 5))


def test_the_start_is_an_average_of_recent_rows() -> None:
    torch.manual_seed(0)
    network, rows = PaperCNN(), torch.rand(3, 20, 11)
    start_as_average(network, 20, newest=0.3, pair=0.2, mean=0.5)
    with torch.no_grad():
        for layer in (network.conv1.weight[2:], network.conv2.weight[3:], network.conv3.weight[:, 3:]):
            layer.zero_()
        scores = network(rows)
    want = 0.3 * rows[:, -1] + 0.2 * (rows[:, -1] + rows[:, -2]) + 0.5 * rows.mean(1)
    torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-4)
