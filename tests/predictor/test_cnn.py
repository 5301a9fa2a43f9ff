"""The network against the paper's description, written out in loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.errors import ShapeError
from attnpred.predictor import cnn
from attnpred.predictor.cnn import PaperCNN, UnpaddedCNN, start_as_average

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


def network(seed: int = 0, kind: type[PaperCNN] = PaperCNN) -> PaperCNN:
    torch.manual_seed(seed)
    return kind()


@pytest.mark.parametrize(("history", "blocks"), [(1, 1), (1, 4), (3, 1), (4, 3), (2, 5)])
def test_is_what_the_paper_describes(history: int, blocks: int) -> None:
    net, rows = network(), torch.rand(2, history, blocks)
    expected = torch.tensor([described(net, image.double().tolist()) for image in rows])
    torch.testing.assert_close(net(rows), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("history", "blocks"), [(5, 1), (6, 3), (9, 2)])
def test_without_padding_the_rows_at_both_ends_are_context_only(history: int, blocks: int) -> None:
    """In an endless picture of the padded network, the rows of features that see no further than H rows."""
    net, rows, far = network(kind=UnpaddedCNN), torch.rand(2, history, blocks), torch.rand(2, 6, blocks)
    padded = network()
    padded.load_state_dict(net.state_dict())
    hidden = padded.conv2(padded.conv1(torch.cat((far, rows, far), 1)[:, None]).relu()).relu()
    want = padded.conv3(hidden[:, :, 6 + 2 : 6 + history - 2].mean(2))[:, 0]
    torch.testing.assert_close(net(rows), want, atol=1e-6, rtol=1e-5)


def test_without_padding_five_rows_are_needed() -> None:
    with pytest.raises(ShapeError, match="got 4 history rows, expected at least 5: give UnpaddedCNN more rows"):
        network(kind=UnpaddedCNN)(torch.rand(1, 4, 3))


@pytest.mark.parametrize("kind", [PaperCNN, UnpaddedCNN])
def test_has_the_published_parameters(kind: type[PaperCNN]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in network(kind=kind).state_dict().items()}
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


def test_without_padding_recency_is_taken_from_the_oldest_rows() -> None:
    """What an impulse adds to the score in row j and what it adds in row H-4+j sum to what it adds further inside."""
    net, history = network(3, UnpaddedCNN), 16
    impulses = torch.zeros(history + 1, history, 9)
    impulses[torch.arange(history), torch.arange(history), 4] = 1.0  # image i: row i; the last one stays empty
    with torch.no_grad():
        scores = net(impulses)[:, 4]
    added = scores[:-1] - scores[-1]
    inside = added[4 : history - 4]
    torch.testing.assert_close(inside, inside[:1].expand_as(inside), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(added[:4] + added[-4:], inside[:4], atol=1e-6, rtol=1e-4)
    assert (added[-4:] - inside[0]).abs().min() > 1e-4


def test_without_padding_a_circle_has_no_newest_row() -> None:
    circle, starts = torch.rand(12, 7), range(0, 12, 5)
    pictures = torch.stack([torch.cat((circle.roll(start, 0), circle.roll(start, 0)[:4])) for start in starts])
    with torch.no_grad():
        unpadded, padded = network(3, UnpaddedCNN)(pictures), network(3)(pictures)
    torch.testing.assert_close(unpadded, unpadded[:1].expand_as(unpadded), atol=1e-6, rtol=1e-5)
    assert (padded[1:] - padded[0]).abs().min() > 1e-5


def test_another_number_of_dimensions_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"got rows of shape \(4, 5\), expected \[any, any, any\]"):
        network()(torch.rand(4, 5))


@pytest.mark.parametrize("kind", [PaperCNN, UnpaddedCNN])
def test_the_start_is_an_average_of_recent_rows(kind: type[PaperCNN]) -> None:
    net, rows = network(kind=kind), torch.rand(3, 20, 11)
    start_as_average(net, 20, newest=0.3, pair=0.2, mean=0.5)
    with torch.no_grad():
        for layer in (net.conv1.weight[2:], net.conv2.weight[3:], net.conv3.weight[:, 3:]):
            layer.zero_()
        scores = net(rows)
    want = 0.3 * rows[:, -1] + 0.2 * (rows[:, -1] + rows[:, -2])
    if kind is PaperCNN:
        want += 0.5 * rows.mean(1)
    else:  # the sums of differences have a second end
        want += 0.5 * rows[:, 4:].mean(1) - 0.3 * rows[:, 3] - 0.2 * (rows[:, 3] + rows[:, 2])
    torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-4)
