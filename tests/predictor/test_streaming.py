"""The streaming predictor: its peaks are the description written as loops, and its state survives every cache operation."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.errors import PredictorError
from attnpred.predictor.digest import Digest, DigestMap
from attnpred.predictor.predictor_config import PredictorConfig
from attnpred.predictor.pretrained import Predictor
from attnpred.predictor.streaming import FEATURES, PEAKS, Stream

P, HEADS, DIM = 4, 2, 6


def trained(layers: str = "0", vectors: tuple[int, ...] = (1, 4)) -> Predictor:
    torch.manual_seed(0)
    config = PredictorConfig("streaming", block_size=P, layers=layers, heads=HEADS, head_dim=DIM, rank=6)
    predictor = Predictor(config)
    network = predictor.streaming
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
        network.vectors.copy_(torch.tensor(vectors).float().expand(len(config.layer_ids), -1))
    return predictor


def started(blocks: int, digest_map: DigestMap | None = None, batch: int = 1) -> Stream:
    stream = Stream(P, digest_map, 8)
    stream.seal(torch.randn(batch, HEADS, blocks * P, DIM))
    stream.look(torch.randn(batch, 2 * HEADS, DIM), 0.5, HEADS)
    return stream


def test_peaks_fade_and_rise_as_described() -> None:
    """One block that is attended now and then, one that the digest speaks for."""
    stream = started(6)
    rows = [torch.rand(1, HEADS, 6) for _ in range(7)]
    attended = [torch.rand(1, HEADS, 6) < 0.5 for _ in rows]
    want = torch.full((len(PEAKS), HEADS, 6), -14.0)
    for row, known in zip(rows, attended, strict=True):
        stream.look(torch.randn(1, 2 * HEADS, DIM), 0.5, HEADS)
        stream.push(row[:, :, None], known[:, :, None])
        for e, rate in enumerate(PEAKS):
            for head in range(HEADS):
                for block in range(6):
                    seen = (
                        math.log(row[0, head, block])
                        if known[0, head, block]
                        else stream.digest.estimate[0, head, block]
                    )
                    want[e, head, block] = max(want[e, head, block] - rate, float(seen))
    torch.testing.assert_close(stream.peaks.view()[0].transpose(0, 1), want)


def test_what_was_attended_is_pushed_the_same_either_way() -> None:
    one = started(9)
    one.push(torch.rand(1, HEADS, 3, 9))
    other = copy.deepcopy(one)
    selection = torch.stack([torch.randperm(9)[:4] for _ in range(HEADS)])[None]
    maxima = torch.rand(1, HEADS, 4)
    row = torch.zeros(1, HEADS, 9).scatter(2, selection, maxima)
    known = torch.zeros(1, HEADS, 9, dtype=torch.bool).scatter(2, selection, True)
    one.push_attended(selection, maxima, 9)
    other.push(row[:, :, None], known[:, :, None])
    torch.testing.assert_close(one.peaks.view(), other.peaks.view())


def test_the_score_weighs_the_features() -> None:
    stream = started(12)
    stream.push(torch.rand(1, HEADS, 3, 12))
    weights = torch.randn(HEADS, FEATURES)
    want = (stream.features(2, 9) * weights[:, None]).sum(-1)
    torch.testing.assert_close(stream.score(weights, 2, 9, 10)[..., 2:9], want)
    assert stream.features(2, 9)[0, 0, :, -1].tolist() == [pytest.approx(math.log2(9 - n)) for n in range(2, 9)]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(("seal", "crop", "select", "repeat")), st.integers(1, 5)), max_size=8))
@pytest.mark.parametrize("vectors", [None, (1, 4), (2, 2)])
def test_a_digest_after_any_operations_is_the_digest_of_what_is_left(
    vectors: tuple[int, ...] | None, steps: list[tuple[str, int]]
) -> None:
    """Codes depend on the keys alone, so any order of operations must end where sealing the rest at once ends."""
    generator = torch.Generator().manual_seed(1)
    digest_map = None if vectors is None else trained(vectors=vectors).streaming.digest_map(0)
    keys = torch.randn(2, HEADS, 20 * P, DIM, generator=generator)
    digest = Digest(P, digest_map)
    digest.seal(keys)
    for name, number in steps:
        if name == "seal":
            new = torch.randn(keys.shape[0], HEADS, number * P, DIM, generator=generator)
            keys = torch.cat((keys[:, :, : digest.sealed * P], new), 2)
            digest.seal(new)
        elif name == "crop":
            columns = max(2, digest.sealed - number)
            digest.crop(columns)
            keys = keys[:, :, : (columns - 1) * P]
        elif name == "select":
            rows = torch.tensor([number % keys.shape[0], 0])
            digest.select(rows)
            keys = keys[rows]
        elif keys.shape[0] < 8:
            digest.repeat(2)
            keys = keys.repeat_interleave(2, 0)
    assert digest.sealed == keys.shape[2] // P
    fresh = Digest(P, digest_map)
    fresh.map = digest.map  # of plain mean keys, the units are those of the keys that were sealed first
    query = torch.randn(keys.shape[0], 2 * HEADS, DIM, generator=generator)
    fresh.seal(keys)
    for one in (digest, fresh):
        one.look(query, 0.5, HEADS)
    torch.testing.assert_close(digest.estimate, fresh.estimate)


def test_a_row_has_the_digest_that_it_has_alone() -> None:
    """Also in the units of plain mean keys, which come from the keys of the row."""
    keys = torch.randn(2, HEADS, 6 * P, DIM) * torch.tensor([1.0, 30.0]).view(2, 1, 1, 1)
    query = torch.randn(2, 2 * HEADS, DIM)
    estimates = []
    for rows in (slice(0, 2), slice(1, 2)):
        digest = Digest(P)
        digest.seal(keys[rows])
        digest.look(query[rows], 0.5, HEADS)
        estimates.append(digest.estimate[-1])
    torch.testing.assert_close(*estimates)


def test_a_vector_per_token_finds_the_one_key_that_a_mean_would_drown() -> None:
    """One token of a block has the query's own direction, the rest point away from it a little."""
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(DIM), dim=0) * 4
    keys = torch.randn(1, 1, 12 * P, DIM) * 0.3
    keys[0, 0, 5 * P + 1] = query * 0.6
    keys[0, 0, 5 * P + 2 : 6 * P] -= query * 0.3
    eye = torch.eye(DIM)[None]
    ranks = []
    for vectors in (1, P):
        digest = Digest(P, DigestMap(eye, eye, torch.zeros(1, DIM), (vectors,)))
        digest.seal(keys)
        digest.look(query[None, None], 1.0, 1)
        ranks.append(int((digest.estimate[0, 0] > digest.estimate[0, 0, 5]).sum()))
    assert ranks[1] == 0 < ranks[0]


def test_weights_of_another_model_are_refused_by_name() -> None:
    predictor = trained(layers="0 3")
    assert predictor.place(3) == 1
    with pytest.raises(PredictorError, match=r"got no weights for layer 1, expected layers \[0, 3\]"):
        predictor.place(1)
    digest = Digest(P, predictor.streaming.digest_map(0))
    with pytest.raises(PredictorError, match="got keys of 3 heads of 6, expected 2 of 6"):
        digest.seal(torch.randn(1, 3, P, DIM))


def test_a_saved_streaming_predictor_comes_back(tmp_path) -> None:
    predictor = trained("0 2")
    loaded = Predictor.from_pretrained(predictor.save_pretrained(tmp_path))
    assert loaded.config == predictor.config
    for name, tensor in predictor.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor)
    assert loaded.streaming.digest_map(1).vectors == (1, 4)


def test_the_state_is_small() -> None:
    """Codes of the trained kind and peaks, per byte of half-precision keys and values: counted, not believed."""
    stream = Stream(16, DigestMap(torch.randn(2, 64, 32), torch.randn(2, 64, 32), torch.zeros(2, 64), (2, 4)), 8)
    stream.seal(torch.randn(1, 2, 160, 64))
    stream.push(torch.rand(1, 2, 1, 10))
    blocks, half = 10 * 2, 2
    assert stream.bytes() == 10 * (2 + 4) * 16 + blocks * len(PEAKS) * 4
    assert stream.bytes() / (blocks * 16 * 64 * 2 * half) < 0.02
