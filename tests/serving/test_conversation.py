"""A conversation's answers are those of stock `generate` on all that was said, whatever was switched or broken off."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.hf import attach, load_model, make_policy
from attnpred.serving.answering import Sampling
from attnpred.serving.conversation import SPARE, Conversation
from attnpred.serving.kept import KeptTexts
from attnpred.serving.reader import Reader
from tests.serving.test_turns import CHATML, tokenizer

STORY = "The old clock stood in the hall. Nobody had wound it for years, and yet it was never wrong by a minute. " * 12
SPARSE = CacheConfig(budget=96, num_sink_tokens=16, recent_window=16, dense_layers=0)
WHOLE = replace(SPARSE, budget=1.0)
SHORT = Sampling(new_tokens=8)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("demo", device="cpu")[0]


@pytest.fixture
def talk(model: Any, tmp_path: Path) -> Iterator[Any]:
    """Return a function: template and settings to a conversation about `STORY`."""
    opened: list[Conversation] = []

    def make(
        template: str | None = CHATML,
        settings: CacheConfig = SPARSE,
        policy: str = "quest",
        limit: int = 4096,
        **more: Any,
    ) -> Conversation:
        reader = Reader(model, KeptTexts(tmp_path / "texts"), chunk=64, short=100)
        made = make_policy(policy, None, model.config, settings)
        opened.append(Conversation(reader, tokenizer(template), more.get("document", STORY), made, settings, limit))
        return opened[-1]

    with attach(model, policy="full"):
        yield make
        for one in opened:
            one.close()


def heard(conversation: Conversation, question: str, sampling: Sampling = SHORT) -> tuple[str, str]:
    """Return an answer, and what was said of it as it came."""
    parts: list[str] = []
    return conversation.ask(question, sampling, parts.append).text, "".join(parts)


def stock(model: Any, words: Any, text: str, new: int = 8) -> str:
    """Return what the model by itself says after `text`."""
    ids = words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, cache_implementation="dynamic"
    )
    return str(words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).lstrip()


@pytest.mark.slow
def test_with_a_budget_for_all_answers_are_those_of_stock_generate(talk: Any, model: Any) -> None:
    conversation = talk(settings=WHOLE)
    words, turns = conversation.tokenizer, conversation.turns
    said = turns.opening(STORY)
    for question in ("Who wound it?", "Where did it stand?", "Why?"):
        answer, streamed = heard(conversation, question)
        said += question + turns.answer
        assert answer == streamed == stock(model, words, said) != ""
        said += words.decode(conversation.ids[conversation.asked :]) + turns.question
    assert words.decode(conversation.ids) + turns.question == said


def test_the_cache_goes_on(talk: Any) -> None:
    """What was read or said before is not read again."""
    conversation = talk()
    before = conversation.open()
    heard(conversation, "Who wound it?")
    heard(conversation, "Why?")
    assert conversation.open() is before and before.get_seq_length() == len(conversation.ids) - 1
    assert before.stats()["total"]["sparse_steps"] == 2 * 7 * 5


def test_a_switch_answers_as_if_it_had_always_been_so(talk: Any) -> None:
    """Of the answers so far the text stays; the keys are those that the model computes with all of it in sight."""
    one, other = talk(policy="ema"), talk(policy="quest", settings=replace(SPARSE, budget=128))
    for conversation in (one, other):
        heard(conversation, "Who wound it?")
    other.ids = list(one.ids)
    other.switch(other.policy, other.settings)
    one.switch(other.policy, other.settings)
    assert heard(one, "Where did it stand?") == heard(other, "Where did it stand?")
    assert one.open().policy is other.policy and one.open().settings.budget == 128


def test_the_full_cache_answers_the_last_question_and_changes_nothing(talk: Any, model: Any) -> None:
    conversation = talk()
    with pytest.raises(ConfigError, match="got no question so far"):
        conversation.ask_full(SHORT, print)
    heard(conversation, "Who wound it?")
    heard(conversation, "Why?")
    ids, parts = list(conversation.ids), list[str]()
    full = conversation.ask_full(SHORT, parts.append)
    said = conversation.tokenizer.decode(ids[: conversation.asked])
    assert full.text == "".join(parts) == stock(model, conversation.tokenizer, said)
    assert full.stats["total"]["compression"] == 1.0
    assert conversation.ids == ids and conversation.open().get_seq_length() == len(ids) - 1


def test_a_stopped_answer_is_part_of_the_conversation(talk: Any, model: Any) -> None:
    conversation = talk(settings=WHOLE)
    parts: list[str] = []
    answer = conversation.ask("Who wound it?", SHORT, parts.append, lambda: len(parts) >= 2)
    assert not answer.is_whole and 2 <= len(answer.ids) < 8
    said = conversation.tokenizer.decode(conversation.ids) + conversation.turns.question + "Why?"
    assert heard(conversation, "Why?")[0] == stock(model, conversation.tokenizer, said + conversation.turns.answer)


def test_an_answer_that_breaks_leaves_no_trace(talk: Any) -> None:
    """Also none in a policy that has dropped blocks meanwhile."""
    for policy in ("quest", "snapkv"):
        one, other = talk(policy=policy), talk(policy=policy)

        def broken(text: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            one.ask("Who wound it?", SHORT, broken)
        assert heard(one, "Why?") == heard(other, "Why?") and one.ids == other.ids


def test_plain_answers_end_with_their_line(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the line that an answer brings is that of the next question."""
    conversation = talk(template=None, document="")
    wanted = iter(conversation.tokenizer(" Nobody did.\nQuestion", add_special_tokens=False)["input_ids"])

    def generate(ids: torch.Tensor, streamer: Any, stopping_criteria: Any, **more: Any) -> None:
        streamer.put(ids)
        done = torch.tensor([False])
        while not done.any():
            streamer.put(torch.tensor([next(wanted)]))
            done = stopping_criteria[0](ids, ids)
        streamer.end()

    monkeypatch.setattr(conversation.reader.model, "generate", generate)
    assert heard(conversation, "Who wound it?") == ("Nobody did.", "Nobody did.")
    monkeypatch.undo()
    heard(conversation, "Why?")
    text = conversation.tokenizer.decode(conversation.ids[: conversation.asked])
    assert text.endswith("Question: Who wound it?\nAnswer: Nobody did.\nQuestion: Why?\nAnswer:")
    assert conversation.tokenizer.bos_token_id in (None, conversation.ids[0])


def test_a_sample_depends_on_its_seed_and_leaves_the_global_generator_alone(talk: Any) -> None:
    state = torch.random.get_rng_state()
    said = [heard(talk(), "Why?", Sampling(12, 1.5, seed))[0] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2] and torch.equal(torch.random.get_rng_state(), state)


def test_a_document_or_a_question_without_room_is_refused(talk: Any) -> None:
    length = len(talk().document)
    with pytest.raises(ConfigError, match=f"got a document of {length} tokens, expected at most {length - 1} "):
        talk(limit=length - 1 + SPARE)
    conversation = talk(limit=length + SPARE)
    with pytest.raises(ConfigError, match=r"tokens up to this question, expected fewer than the .* begin again"):
        heard(conversation, "Why? " * SPARE)
    conversation.limit = length + 40
    answer = conversation.ask("Why?", Sampling(new_tokens=10_000), lambda text: None)
    assert len(conversation.ids) == length + 40 and not answer.is_whole
    with pytest.raises(ConfigError, match="begin again after the document"):
        heard(conversation, "Why?")
    conversation.forget()
    assert heard(conversation, "Why?")[0]
