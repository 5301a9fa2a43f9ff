"""What the recovery bench reports is what a loop over steps finds; its intervals and words mean what they say."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.capture import captured
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.evaluation.recovery import Document, measure, read_document
from attnpred.evaluation.statistics import bootstrap
from attnpred.evaluation.tasks.recovery import KINDS, text_tokens
from attnpred.evaluation.variants import parse_variant
from attnpred.hf import load_model
from attnpred.policies import POLICIES, Ema, Oracle, Streaming
from attnpred.policies.base import Policy
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from tests.models import prompt, tiny_model

P, LAYERS, HEADS, GROUP, DIM, PROMPT, STEPS = 4, 2, 2, 2, 8, 3, 11
CONFIG = CacheConfig(
    budget=6 * P,
    block_size=P,
    num_sink_tokens=0,
    recent_window=P,
    history=PROMPT,
    calibration_interval=0,
    dense_layers=0,
    dense_when_fits=False,
)


def document(seed: int = 0, length: int = 62, ends_strong: bool = False) -> Document:
    """Random queries and keys; if it ends strong, every query wants the last blocks most, those from token 48 on."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(LAYERS, HEADS * GROUP, PROMPT + STEPS, DIM, generator=generator)
    keys = torch.randn(LAYERS, HEADS, length, DIM, generator=generator)
    queries[..., 0], keys[..., 0] = 2.0, 6.0 * ends_strong * (torch.arange(length) >= 48)
    values = torch.randn(LAYERS, HEADS, length, DIM, generator=generator)
    return Document("toy", f"toy-{seed}", queries.half(), keys.half(), values.half(), (0, 1), 0.7)


def best_choice(mass: Tensor, first: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return kept, best, hits and new of the oracle, step by step, for mass [T, N] of one head."""
    kept, best, hits, new = [], [], [], []
    last: set[int] = set()
    for step in range(PROMPT, PROMPT + STEPS):
        length, row = first + step + 1, (mass[step] / GROUP).tolist()
        recent = set(range((length - P) // P, -(-length // P)))
        others = sorted(set(range(-(-length // P))) - recent, key=lambda block: -row[block])[: 6 - 2]
        chosen, order = recent | set(others), sorted(range(len(row)), key=lambda block: -row[block])
        top = order[: len(chosen)]
        kept.append(sum(row[block] for block in chosen))
        best.append(sum(row[block] for block in top))
        hits.append(len(chosen & set(top)) / len(top))
        new.append(len(chosen - last) / len(chosen))
        last = chosen
    return kept, best, hits, new


def test_the_oracle_is_a_loop_over_steps() -> None:
    """No sinks, and a recent window of one block: all else is the largest mass. Each document is measured by itself."""
    documents = [document(0), document(1)]
    found = measure(documents, Oracle(), CONFIG)
    for i, one in enumerate(documents):
        for layer in range(LAYERS):
            for head in range(HEADS):
                kept, best, hits, new = best_choice(one.mass(P)[layer, head].float(), one.length - PROMPT - STEPS)
                place = i, layer, head
                assert float(found.kept[place]) == pytest.approx(sum(kept) / STEPS, abs=1e-4)
                assert float(found.best[place]) == pytest.approx(sum(best) / STEPS, abs=1e-4)
                assert float(found.hits[place]) == pytest.approx(sum(hits) / STEPS)
                assert float(found.new[place]) == pytest.approx(sum(new[1:]) / (STEPS - 1))
                want = [a / b for a, b in zip(kept, best, strict=True)]
                assert found.ratios[place].tolist() == pytest.approx(want, abs=1e-4)
    assert (found.kept < found.best).all() and found.late is None and found.state == 0


def make(name: str) -> Policy[Any]:
    torch.manual_seed(0)
    return POLICIES[name].untrained(P, GROUP, DIM)


@pytest.mark.parametrize("late_share", [None, 0.2])
@pytest.mark.parametrize("name", [name for name in POLICIES if not POLICIES[name].is_dense])
def test_no_policy_keeps_more_than_the_best_choice(name: str, late_share: float | None) -> None:
    config = CacheConfig(
        budget=0.5, block_size=P, num_sink_tokens=P, recent_window=P, history=PROMPT, late_share=late_share
    )
    found = measure([document()], make(name), config)
    assert (found.kept <= found.best + 1e-4).all() and (found.kept > 0).all() and (found.best <= 1 + 1e-3).all()
    assert found.ratios.shape == (1, LAYERS, HEADS, STEPS) and (found.ratios >= 0).all()
    assert (found.ratios <= 1 + 1e-4).all()
    for share in (found.hits, found.new):
        assert share.shape == (1, LAYERS, HEADS) and (share >= 0).all() and (share <= 1).all()
    limited = POLICIES[name].corrects and late_share is not None
    assert (found.late is not None) == limited and (not limited or found.late <= 0.2)


def test_what_never_changes_has_no_churn() -> None:
    """Sinks and the newest tokens: the same blocks while one block fills up, one new block of six for each that opens."""
    within = document(length=4 * 16)  # 14 rows inside the last block
    config = CacheConfig(budget=3 * 16, block_size=16, num_sink_tokens=0, recent_window=16, history=PROMPT)
    assert (measure([within], Streaming(), config).new == 0).all()
    first = 62 - STEPS  # tokens before the first step; 52, 56 and 60 tokens fill a block
    sizes = [6 if length % P else 5 for length in range(first + 1, 63)]
    fresh = [1 / size if (length - 1) % P == 0 else 0 for length, size in zip(range(first + 1, 63), sizes, strict=True)]
    churn = measure([document()], Streaming(), CONFIG).new
    assert churn.flatten().tolist() == pytest.approx([sum(fresh[1:]) / (STEPS - 1)] * churn.numel())


def test_the_oracle_hits_everything_where_the_window_is_among_the_best() -> None:
    """So what is always kept takes no better block's place."""
    found = measure([document(ends_strong=True)], Oracle(), CONFIG)
    assert (found.hits == 1).all() and torch.allclose(found.kept, found.best)
    assert (measure([document(ends_strong=True)], Streaming(), CONFIG).hits < 1).any()


def test_documents_that_do_not_fit_are_one_line() -> None:
    def refused(documents: list[Document], config: CacheConfig, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            measure(documents, Ema(), config)
        assert "\n" not in str(caught.value)

    refused([document(), document(length=66)], CONFIG, "got documents of several lengths, expected one")
    longer = CacheConfig(budget=24, block_size=P, num_sink_tokens=0, recent_window=P, history=PROMPT + STEPS)
    refused([document()], longer, "got history=14 for documents of 14 rows")


def test_a_document_is_what_the_model_attended() -> None:
    """Mass is a group's sum, so a row adds up to the number of its query heads."""
    found = read_document(tiny_model("llama"), prompt(1, 45), 9, "kind", "name")
    assert (found.kind, found.name, found.length, found.layer_ids) == ("kind", "name", 45, (0, 1, 2))
    assert found.queries.shape == (3, 4, 9, 8) and found.keys.shape == (3, 2, 45, 8)
    mass = found.mass(P)
    assert mass.shape == (3, 2, 9, 12) and found.values.shape == found.keys.shape
    torch.testing.assert_close(mass.float().sum(-1), torch.full((3, 2, 9), 2.0), atol=5e-3, rtol=0)
    rows = captured(tiny_model("llama"), prompt(1, 45), 9, P).rows  # the largest token of a block, of the largest head
    assert (mass >= rows - 2e-3).all() and (mass <= 2 * P * rows + 2e-3).all()


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12), st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_an_interval_holds_the_mean_and_keeps_to_the_values(values: list[float], seed: int) -> None:
    low, high = bootstrap(torch.tensor(values), seed)
    mean = sum(values) / len(values)
    assert min(values) - 1e-5 <= low <= mean + 1e-5 and mean - 1e-5 <= high <= max(values) + 1e-5
    assert [low, high] == bootstrap(torch.tensor(values), seed)


def test_an_interval_shrinks_with_the_spread_and_with_the_number() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = torch.randn(20, generator=generator), torch.randn(500, generator=generator)
    widths = [high - low for low, high in map(bootstrap, (few, few / 4, many, torch.full((20,), 0.25)))]
    assert widths[0] == pytest.approx(2 * 1.96 * float(few.std(correction=0)) / 20**0.5, rel=0.2)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=1e-3)
    assert widths[2] < widths[0] / 3 and widths[3] == 0


def test_a_word_names_a_policy_with_its_settings() -> None:
    config = CacheConfig(budget=0.5)
    for word in ("oracle", "ema:rate=0.25", "ema:rate=0.25,budget=0.125,history=9", "quest:per_query_head=true"):
        variant = parse_variant(word)
        policy, own = variant.make(None, config)
        settings = dict(part.split("=") for part in word.partition(":")[2].split(",") if part)
        assert variant.label == word and isinstance(policy, POLICIES[word.partition(":")[0]])
        assert "rate" not in settings or policy == Ema(0.25)
        assert own.budget == float(settings.get("budget", 0.5)) and own.history == int(settings.get("history", 64))
        assert own.per_query_head == ("per_query_head" in settings)
    word = parse_variant("predicted:late_share=none,predictor=here")
    assert (word.fields, word.settings, word.predictor) == ({}, {"late_share": None}, "here")
    assert parse_variant("predicted:late_share=0").settings == {"late_share": 0}


def test_a_word_finds_a_predictor(tmp_path: Path) -> None:
    Predictor(PredictorConfig("cnn", trained_on="a test")).save_pretrained(tmp_path)
    policy, own = parse_variant(f"predicted:predictor={tmp_path},late_share=0.5").make(None, CacheConfig())
    assert policy.predictor.config.trained_on == "a test" and own.late_share == 0.5


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tarot", "got policy 'tarot', expected one of full"),
        ("", "got policy '', expected one of full"),
        ("ema:speed=1", "got 'speed=1' in policy 'ema:speed=1', expected setting=value with one of "),
        ("ema:rate", "got 'rate' in policy 'ema:rate'"),
        ("predicted:predictor", "got 'predictor' in policy"),
        ("ema:rate=0.1,", "got '' in policy"),
        ("quest:needs_query=false", "got 'needs_query=false' in policy"),
        ("ema:rate=2", "got rate=2, expected above 0 and up to 1"),
        ("ema:rate=fast", "got policy 'ema:rate=fast', expected numbers for rate"),
        ("ema:budget=9", "got budget=9, expected at least"),
        ("ema:late_share=much", "got late_share='much'"),
    ],
)
def test_a_wrong_word_is_one_line(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_variant(word).make(None, CacheConfig())
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model("demo")[1]


@pytest.mark.parametrize(("kind", "length"), [*((kind, 600) for kind in KINDS), ("facts", 150), ("table", 2000)])
def test_a_text_has_exactly_so_manytext_tokens(tokenizer: Any, kind: str, length: int) -> None:
    """A book and a program are cut elsewhere for each document, the others are made by its generator."""
    one = text_tokens(tokenizer, kind, length, 0.0, random.Random(7))
    if kind in ("book", "code"):
        other = text_tokens(tokenizer, kind, length, 0.5, random.Random(7))
    else:
        other = text_tokens(tokenizer, kind, length, 0.0, random.Random(8))
        assert one == text_tokens(tokenizer, kind, length, 0.0, random.Random(7))
    assert len(one) == len(other) == length and one != other


def test_a_text_of_ones_own_is_cut_and_may_be_too_short(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The old mill stood by the river. " * 30, encoding="utf-8")
    assert len(text_tokens(tokenizer, str(file), 100, 0.3, random.Random(0))) == 100
    with pytest.raises(ConfigError, match="expected at least 5000: give a longer one"):
        text_tokens(tokenizer, str(file), 5000, 0.0, random.Random(0))
    with pytest.raises(ConfigError, match=r"got no-such .*, expected a text file or one of facts, book"):
        text_tokens(tokenizer, "no-such", 10, 0.0, random.Random(0))


def test_a_book_with_facts_may_be_too_short(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnpred.evaluation.tasks.recovery.demo_book", lambda: "The mill stood by the river. " * 50)
    with pytest.raises(ConfigError, match="expected at least 2000: use shorter documents"):
        text_tokens(tokenizer, "facts", 2000, 0.0, random.Random(0))
