"""What is learned of the rest: what rows are made of is found, padding counts for nothing, and copies go on alike."""

import torch
from torch import Tensor

from attnpred.kernels.rest import add_rest
from attnpred.predictor.rest import Known, Rest

BATCH, HEADS, KV_HEADS, DIM, ROWS = 2, 4, 2, 8, 16


def rows_of(slope: float, level: float, weight: float, seed: int = 0, rows: int = ROWS) -> tuple[Known, Tensor]:
    """Return rows whose rest has a sum along the mean key and adds share * (vector - weight * output), and the vectors."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, HEADS, rows, DIM, generator=generator)
    mean = torch.randn(BATCH, KV_HEADS, DIM, generator=torch.Generator().manual_seed(9))
    vector = torch.randn(BATCH, HEADS, DIM, generator=torch.Generator().manual_seed(8))
    own, normaliser = (
        torch.randn(BATCH, HEADS, rows, DIM, generator=generator),
        torch.randn(BATCH, HEADS, rows, generator=generator),
    )
    toward = (query.unflatten(1, (KV_HEADS, -1)) @ mean[:, :, None, :, None]).flatten(1, 2)[..., 0]
    total = torch.logaddexp(normaliser, level + slope * toward)
    share = (1 - torch.exp(normaliser - total))[..., None]
    full = own + share * (vector[:, :, None] - weight * own)
    return Known(query, full, total, own, normaliser, mean, torch.ones(1, rows)), vector


def missed(rest: Rest, known: Known) -> float:
    """Return the error that is left of what was missing, over rows it has not seen."""
    assert rest.terms is not None
    found = torch.stack(
        [
            add_rest(known.output[:, :, i], known.query[:, :, i], known.normaliser[:, :, i], rest.terms)[0]
            for i in range(known.query.shape[2])
        ],
        2,
    )
    return float((found - known.full).norm() / (known.output - known.full).norm())


def test_it_finds_what_rows_are_made_of() -> None:
    for slope, weight in ((1.0, 1.0), (0.5, 1.0), (0.5, 0.6)):
        rest, (known, vector) = Rest(), rows_of(slope, 0.5, weight, rows=64)
        assert rest.terms is None and rest.bytes() == 0
        rest.learn(known)
        assert rest.terms is not None
        torch.testing.assert_close(rest.terms.slope, torch.full((BATCH, HEADS), slope), atol=0.05, rtol=0)
        torch.testing.assert_close(rest.terms.weight, torch.full((BATCH, HEADS), weight), atol=0.05, rtol=0)
        torch.testing.assert_close(rest.terms.vector, vector, atol=0.15, rtol=0)
        assert missed(rest, rows_of(slope, 0.5, weight, seed=1)[0]) < 0.1


def test_without_a_rest_it_changes_nothing() -> None:
    known, _ = rows_of(1.0, -60.0, 1.0)
    rest = Rest()
    rest.learn(known)
    assert rest.terms is not None
    output, share = add_rest(known.output[:, :, 0], known.query[:, :, 0], known.normaliser[:, :, 0], rest.terms)
    assert torch.equal(output, known.output[:, :, 0]) and not share.any()


def test_padding_counts_for_nothing() -> None:
    known, _ = rows_of(0.5, 0.5, 1.0)
    counts = torch.ones(BATCH, ROWS)
    counts[1, :5] = 0
    empty = counts[:, None] == 0
    padded = known._replace(
        full=known.full.masked_fill(empty[..., None], 0.0),
        output=known.output.masked_fill(empty[..., None], 0.0),
        full_normaliser=known.full_normaliser.masked_fill(empty, -torch.inf),
        normaliser=known.normaliser.masked_fill(empty, -torch.inf),
        counts=counts,
    )
    alone = Known(*(x[1:, :, 5:] for x in known[:5]), known.mean_key[1:], torch.ones(1, ROWS - 5))
    both, one = Rest(), Rest()
    both.learn(padded)
    one.learn(alone)
    assert both.terms is not None and one.terms is not None
    for found, wanted in zip(both.terms, one.terms, strict=True):
        torch.testing.assert_close(found[1:], wanted, rtol=1e-4, atol=1e-4)


def test_a_row_without_anything_known_has_no_rest() -> None:
    known, _ = rows_of(0.5, 0.5, 1.0)
    rest = Rest()
    rest.learn(known._replace(counts=torch.tensor([[1.0], [0.0]]).expand(-1, ROWS)))
    assert rest.terms is not None
    output, share = add_rest(known.output[:, :, 0], known.query[:, :, 0], known.normaliser[:, :, 0], rest.terms)
    assert torch.equal(output[1], known.output[1, :, 0]) and not share[1].any() and share[0].all()


def test_new_rows_count_more_than_old_ones() -> None:
    (old, _), (new, _) = rows_of(0.2, 0.0, 1.0), rows_of(0.9, 1.0, 1.0, seed=3)
    rest, fresh = Rest(), Rest()
    rest.learn(old)
    before = missed(rest, new)
    rest.learn(new)
    fresh.learn(new)
    assert missed(fresh, new) < missed(rest, new) < before


def test_it_goes_with_the_batch_and_through_a_state() -> None:
    known, _ = rows_of(0.5, 0.5, 0.8)
    rest, other = Rest(), Rest()
    rest.learn(known)
    other.restore(rest.state())
    rest.repeat(2)
    rest.select(torch.tensor([3, 0]))
    assert rest.terms is not None and other.terms is not None
    for found, wanted in zip(rest.terms, other.terms, strict=True):
        assert torch.equal(found, wanted[[1, 0]])
    assert rest.bytes() == sum(x.nbytes for x in rest.terms)
    rest.clear()
    assert rest.terms is None and rest.bytes() == 0
