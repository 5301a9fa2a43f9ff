"""A text that is kept is as good as one that was just read in one call, for every policy; what is damaged is read again."""

import copy
import logging
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnpred
from attnpred.config import CacheConfig
from attnpred.errors import TierFullError
from attnpred.hf import TieredCache, make_policy
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy
from attnpred.serving.kept import KeptTexts
from attnpred.serving.reader import Reader
from tests.hf.support import SMALL, offloaded, separators
from tests.models import prompt, tiny_model

IDS: list[int] = prompt(1, 200, 3)[0].tolist()


def made(policy: str, family: str = "llama", settings: CacheConfig = SMALL) -> Policy[Any]:
    return make_policy(separators(policy), None, tiny_model(family).config, settings)


def reader(folder: Path | None, family: str = "llama", limit: int = 1 << 30) -> tuple[Reader, list[int]]:
    """Return a reader of chunks of 32 tokens, and how many of them it has reported."""
    done: list[int] = []
    kept = KeptTexts(folder, limit)
    return Reader(tiny_model(family), kept, lambda some, total: done.append(some), chunk=32, short=50), done


@torch.no_grad()
def steps(cache: TieredCache, family: str = "llama") -> torch.Tensor:
    """Return what the model says after each of six tokens more."""
    model = tiny_model(family)
    calls = (model(prompt(1, 1, 50 + i), cache=cache, use_cache=True) for i in range(6))
    return torch.stack([call.logits[0, -1] for call in calls])


@torch.no_grad()
def in_one_call(policy: str, family: str = "llama", settings: CacheConfig = SMALL) -> torch.Tensor:
    cache = TieredCache(tiny_model(family).config, policy=made(policy, family, settings), config=settings)
    tiny_model(family)(torch.tensor([IDS]), cache=cache, use_cache=True)
    return steps(cache, family)


SLIDING = [("gemma3_text", policy) for policy in ("full", "snapkv", "h2o", "predicted")]


@pytest.mark.parametrize(("family", "policy"), [*(("llama", policy) for policy in POLICIES), *SLIDING])
def test_every_policy_goes_on_as_if_it_had_read_it_in_one_call(family: str, policy: str, tmp_path: Path) -> None:
    """A model with sliding layers cannot be cut back: its file must end where the policy goes on."""
    with attnpred.attach(tiny_model(family), policy="full", config=SMALL):
        want = in_one_call(policy, family)
        some, done = reader(tmp_path / "texts", family)
        first = some.read(IDS, made(policy, family), SMALL)
        was_kept = any((tmp_path / "texts").glob("*.kv"))
        done.clear()
        again = some.read(IDS, made(policy, family), SMALL)
        assert bool(done) != was_kept
        for cache in (first, again):
            assert cache.get_seq_length() == len(IDS)
            torch.testing.assert_close(steps(cache, family), want, atol=1e-5, rtol=0)


def test_one_file_serves_every_policy_and_budget(tmp_path: Path) -> None:
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL):
        some, done = reader(tmp_path)
        some.read(IDS, made("predicted"), SMALL)
        assert done == [0, 32, 64, 96, 128, 136]  # all but the last 64 tokens, in chunks
        done.clear()
        for policy in ("quest", "ema", "snapkv", "tactic", "full"):
            settings = replace(SMALL, budget=96)
            torch.testing.assert_close(
                steps(some.read(IDS, made(policy), settings)), in_one_call(policy, settings=settings), atol=1e-5, rtol=0
            )
        assert not done and len(list(tmp_path.glob("*.kv"))) == 1


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_it_is_the_same_with_a_slow_tier(offload: str, tmp_path: Path) -> None:
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL):
        want, settings = in_one_call("predicted"), offloaded(SMALL, offload, tmp_path)
        some, done = reader(tmp_path / "texts")
        for _ in range(2):
            with some.read(IDS, made("predicted"), settings) as cache:
                torch.testing.assert_close(steps(cache), want, atol=1e-5, rtol=0)
        some.read(IDS, made("predicted"), SMALL)
        assert done.count(0) == 1  # it was read once, and then taken from the file, with and without a slow tier


def test_another_text_or_block_size_has_a_file_of_its_own(tmp_path: Path) -> None:
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL):
        some, done = reader(tmp_path)
        others = [(IDS, SMALL), ([*IDS[:-1], 5], SMALL), (IDS, replace(SMALL, block_size=8)), (IDS[:150], SMALL)]
        for ids, settings in others:
            some.read(ids, made("ema"), settings)
        assert done.count(0) == len(others) == len(list(tmp_path.glob("*.kv")))


def test_other_weights_have_a_file_of_their_own(tmp_path: Path) -> None:
    """Also where name and config are the same: each text is then read once for each, and not again and again."""
    retrained = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        retrained.get_input_embeddings().weight.mul_(1.1)
    for _ in range(2):
        for model in (tiny_model("llama"), retrained):
            with attnpred.attach(model, policy="full", config=SMALL):
                Reader(model, KeptTexts(tmp_path), chunk=32, short=50).read(IDS, made("ema"), SMALL)
    assert len(list(tmp_path.glob("*.kv"))) == 2


def test_files_are_for_the_user_alone(tmp_path: Path) -> None:
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL):
        reader(tmp_path / "texts")[0].read(IDS, made("ema"), SMALL)
    (file,) = (tmp_path / "texts").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "texts").stat().st_mode) == 0o700


@pytest.mark.parametrize("place", ["header", "blocks"])
def test_a_damaged_file_is_read_again(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL):
        want = in_one_call("quest")
        some, done = reader(tmp_path)
        some.read(IDS, made("quest"), SMALL)
        (file,) = tmp_path.glob("*.kv")
        data = bytearray(file.read_bytes())
        at = 400 if place == "header" else 8 + int.from_bytes(data[:8], "little") + 1000
        data[at] ^= 0xFF
        file.write_bytes(data)
        done.clear()
        torch.testing.assert_close(steps(some.read(IDS, made("quest"), SMALL)), want, atol=1e-5, rtol=0)
        assert done.count(0) == 1 and "the text is read again" in caplog.text
        done.clear()
        some.read(IDS, made("quest"), SMALL)
        assert not done


def test_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL):
        texts = [prompt(1, 200, seed)[0].tolist() for seed in range(4)]
        some, _ = reader(tmp_path)
        some.read(texts[0], made("full"), SMALL)
        size = next(tmp_path.glob("*.kv")).stat().st_size
        stranger = tmp_path / "book.kv"  # saved there by hand: neither counted nor removed
        stranger.write_bytes(bytes(4 * size))
        os.utime(stranger, (0, 0))
        some, done = reader(tmp_path, limit=3 * size + 100)
        for used in (1, 2, 0, 3):  # the first one is used again before the last one comes
            some.read(texts[used], made("full"), SMALL)
        done.clear()
        for used in (0, 2, 3):
            some.read(texts[used], made("full"), SMALL)
        assert not done and len(list(tmp_path.glob("*.kv"))) == 3 + stranger.exists() == 4
        some.read(texts[1], made("full"), SMALL)
        assert done


def test_where_nothing_can_be_kept_the_text_is_read_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    reasons = {
        "more than the limit of 1.00 KiB": reader(tmp_path / "texts", limit=1 << 10)[0],
        "the user has no folder for it": reader(None)[0],
        "file/texts: ": reader(tmp_path / "file" / "texts")[0],
        "others may write to": reader(tmp_path / "open")[0],
    }
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL):
        want = in_one_call("snapkv")
        for reason, some in reasons.items():
            caplog.clear()
            torch.testing.assert_close(steps(some.read(IDS, made("snapkv"), SMALL)), want, atol=1e-5, rtol=0)
            assert reason in caplog.text and "has to be read again the next time" in caplog.text
        caplog.clear()
        reader(tmp_path / "texts", limit=0)[0].read(IDS, made("snapkv"), SMALL)
        assert not caplog.text  # that was asked for
    assert not list(tmp_path.rglob("*.kv"))


def test_what_others_could_have_written_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL):
        some, done = reader(tmp_path / "texts")
        some.read(IDS, made("ema"), SMALL)
        next((tmp_path / "texts").iterdir()).chmod(0o666)
        done.clear()
        some.read(IDS, made("ema"), SMALL)
        assert done and "others may write to" in caplog.text


def test_a_file_is_used_where_there_would_be_no_room_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL):
        some, done = reader(tmp_path)
        some.read(IDS, made("ema"), SMALL)
        done.clear()
        monkeypatch.setattr("attnpred.serving.kept.free_disk_bytes", lambda folder: 0)
        some.read(IDS, made("ema"), SMALL)
        assert not done


def test_no_room_is_an_error_and_no_reason_to_throw_the_file_away(tmp_path: Path) -> None:
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL):
        some, done = reader(tmp_path)
        some.read(IDS, made("ema"), SMALL)
        done.clear()
        with pytest.raises(TierFullError):
            some.read(IDS, made("ema"), replace(SMALL, fast_limit=1000))
        assert not done and len(list(tmp_path.glob("*.kv"))) == 1


def test_a_short_text_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with attnpred.attach(tiny_model("llama"), policy="full", config=SMALL), caplog.at_level(logging.WARNING):
        cache = reader(tmp_path)[0].read(IDS[:40], made("ema"), SMALL)
        assert cache.get_seq_length() == 40 and not caplog.text and not list(tmp_path.iterdir())
