"""Every offline task: exact lengths, the same for a seed, and answers that stand in the document where they should."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from attnpred.errors import ConfigError
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.tasks import TASKS, Example, Question, Wanted
from attnpred.evaluation.tasks.haystack import Haystack, encode
from attnpred.hf import load_model

HIDDEN = (
    "facts1 facts4 facts4_prompt facts_turns hops chain recite needle needle4 needle_values passkey lookup niah_single_1 "
    "niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue niah_multiquery vt"
).split()
LENGTH, COUNT = 1500, 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model("demo", device="cpu")[1]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A part of the book: most of the time goes into its tokens."""
    file = tmp_path_factory.mktemp("texts") / "part.txt"
    file.write_text(demo_book()[:12_000], encoding="utf-8")
    return (str(file),)


@pytest.fixture(scope="module")
def made(tokenizer: Any, texts: tuple[str, ...]) -> dict[str, list[Example]]:
    wanted = Wanted(LENGTH, COUNT, seed=4, texts=texts)
    return {name: TASKS[name]().examples(tokenizer, wanted) for name in (*HIDDEN, "cwe", "fwe")}


def longest(example: Example) -> int:
    return len(example.tokens) + max(len(question.tokens) for question in example.questions)


@pytest.mark.parametrize("name", [*HIDDEN, "cwe", "fwe"])
def test_a_document_and_its_longest_question_are_exactly_as_long_as_asked(
    name: str, made: dict[str, list[Example]]
) -> None:
    lengths = [longest(example) for example in made[name]]
    assert max(lengths) == LENGTH
    if name != "facts4_prompt":  # there each question is a document, and only the longest fills it
        assert set(lengths) == {LENGTH}
    assert len({example.name for example in made[name]}) == len(made[name]) >= COUNT


@pytest.mark.parametrize("name", [*HIDDEN, "cwe", "fwe"])
def test_the_seed_decides(name: str, made: dict[str, list[Example]], tokenizer: Any, texts: tuple[str, ...]) -> None:
    task = TASKS[name]()
    assert task.examples(tokenizer, Wanted(LENGTH, COUNT, seed=4, texts=texts)) == made[name]
    other = task.examples(tokenizer, Wanted(LENGTH, COUNT, seed=5, texts=texts))
    assert all(one.tokens != two.tokens for one, two in zip(made[name], other, strict=True))
    assert len({example.tokens for example in made[name]}) == len(made[name])


@pytest.mark.parametrize("name", HIDDEN)
def test_every_answer_stands_in_its_document_and_scores_one(
    name: str, made: dict[str, list[Example]], tokenizer: Any
) -> None:
    task = TASKS[name]()
    for example in made[name]:
        text = tokenizer.decode(example.tokens)
        for question in example.questions:
            assert all(answer in text for answer in question.answers)
            assert all(answer not in tokenizer.decode(question.tokens) for answer in question.answers)
            assert len(set(question.answers)) == len(question.answers)
            room = len(encode(tokenizer, " " + ", ".join(question.answers)))
            assert question.new_tokens >= room - len(question.answers)
            if name != "recite":
                assert task.score(" " + ", ".join(question.answers) + ".", question) == 1.0
            assert task.score(" nothing of the kind", question) < 1.0


@pytest.mark.parametrize("name", ["facts1", "facts4", "needle4", "lookup", "chain"])
def test_a_fact_stands_once_and_answers_differ(name: str, made: dict[str, list[Example]], tokenizer: Any) -> None:
    """The words before the number in the question are those before the planted number, and before no other."""
    for example in made[name]:
        text = tokenizer.decode(example.tokens).lower()
        for question in example.questions:
            words = tokenizer.decode(question.tokens).split("? ")[1].lower()
            assert [found.strip() for found in re.findall(re.escape(words) + r"( \d+)", text)] == list(question.answers)
        answers = [question.answers for question in example.questions]
        assert len(set(answers)) == len(answers)


def place(example: Example, question: Question, tokenizer: Any) -> float:
    text = tokenizer.decode(example.tokens)
    return text.index(question.answers[0]) / len(text)


@pytest.mark.parametrize("name", ["facts4", "needle", "needle4", "passkey", "lookup"])
def test_the_depth_that_a_label_names_is_where_the_answer_stands(
    name: str, tokenizer: Any, texts: tuple[str, ...]
) -> None:
    for example in TASKS[name]().examples(tokenizer, Wanted(3000, 5, seed=1, texts=texts)):
        for question in example.questions:
            assert place(example, question, tokenizer) == pytest.approx(question.labels["depth"], abs=0.06)


def test_needles_cover_all_depths(tokenizer: Any, texts: tuple[str, ...]) -> None:
    found = TASKS["needle"]().examples(tokenizer, Wanted(1000, 5, texts=texts))
    assert [example.questions[0].labels["depth"] for example in found] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_facts_are_asked_about_the_same_documents_apart_in_turn_and_in_the_prompt(
    made: dict[str, list[Example]],
) -> None:
    for i, example in enumerate(made["facts4"]):
        turns = made["facts_turns"][i]
        assert turns.tokens == example.tokens and turns.in_turn and not example.in_turn
        assert [question.labels["turn"] for question in turns.questions] == [1, 2]
        assert [q.tokens for q in turns.questions] == [q.tokens for q in example.questions[:2]]
        prompts = made["facts4_prompt"][4 * i : 4 * i + 4]
        for prompt, question in zip(prompts, example.questions, strict=True):
            assert prompt.tokens == (*example.tokens, *question.tokens)
            assert prompt.questions[0].tokens == () and prompt.questions[0].answers == question.answers


def test_a_chain_of_hops_leads_from_link_to_link(made: dict[str, list[Example]], tokenizer: Any) -> None:
    for example in made["hops"]:
        links = dict(re.findall(r"The code of (\w+) is (\d+)\.", tokenizer.decode(example.tokens)))
        name = re.findall(r"of (\w+)\?", tokenizer.decode(example.questions[0].tokens))[0]
        for question in example.questions:
            here = name
            for _ in range(question.labels["hops"]):
                here = links[here]
            assert question.answers == (here,)


class Reader:
    """A session that finds what is asked for by reading, and errs at the calls it is told to."""

    def __init__(self, tokenizer: Any, wrong: set[int] = frozenset()) -> None:
        self.tokenizer, self.wrong, self.calls = tokenizer, wrong, 0

    def read(self, tokens: Any) -> str:
        return self.tokenizer.decode(tokens)

    def fork(self, cache: str) -> str:
        return cache

    def ask(self, cache: str, question: Question) -> str:
        self.calls += 1
        if self.calls in self.wrong:
            return " 0009."
        words = self.tokenizer.decode(question.tokens).split("? ")[1]
        return re.findall(re.escape(words.lower()) + r"( \d+)", cache.lower())[0] + "."


def test_who_reads_follows_the_chain_through_every_record_and_who_errs_is_lost(
    made: dict[str, list[Example]], tokenizer: Any
) -> None:
    task = TASKS["chain"]()
    for example in made["chain"]:
        items = list(task.run(Reader(tokenizer), example))
        assert [item.value for item in items] == [1.0] * 6
        assert sorted(item.labels["record"] for item in items) == list(range(6))
        astray = list(task.run(Reader(tokenizer, {1}), example))
        assert astray[0].value == 0.0 and len(astray) == 6
        assert [item.name for item in astray] == [item.name for item in items]


def test_questions_apart_and_in_turn_are_scored_by_the_base(made: dict[str, list[Example]], tokenizer: Any) -> None:
    for name in ("facts4", "facts_turns", "lookup", "needle4"):
        reader = Reader(tokenizer, {2})
        items = [item for example in made[name] for item in TASKS[name]().run(reader, example)]
        assert [item.value for item in items] == [float(i != 1) for i in range(len(items))]
        assert len({item.name for item in items}) == len(items)


def test_what_is_recited_counts_once_and_only_if_right(made: dict[str, list[Example]]) -> None:
    task, question = TASKS["recite"](), made["recite"][0].questions[0]
    told = list(question.labels["told"].items())
    first = question.labels["start"].split(" of ")[-1].removesuffix(" is")
    assert first == told[0][0]
    right = (
        f" {told[0][1]}. The code of {told[1][0]} is {told[1][1]}. The code of {told[1][0]} is 1. A lot of talk is 5."
    )
    assert task.score(right, question) == 0.5
    assert task.score(f" 1. The code of {told[0][0]} is {told[0][1]}.", question) == 0.0  # the first word counts


def test_variables_are_those_of_one_chain(made: dict[str, list[Example]], tokenizer: Any) -> None:
    for example in made["vt"]:
        text = tokenizer.decode(example.tokens)
        given = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text))
        value = re.findall(r"the value (\d+)", tokenizer.decode(example.questions[0].tokens))[0]

        def root(name: str, given: dict[str, str] = given) -> str:
            return root(given[name]) if name in given else name

        assert {name for name in given if root(name) == value} == set(example.questions[0].answers)
        places = [text.index(f"VAR {name} = ") for name in example.questions[0].answers]
        assert places == sorted(places)


def test_common_and_frequent_words_are_those_that_a_count_finds(made: dict[str, list[Example]], tokenizer: Any) -> None:
    for example in made["cwe"]:
        counts = Counter(re.findall(r"\d+\. ([a-z]+)", tokenizer.decode(example.tokens)))
        common = counts.most_common(11)
        assert {word for word, _ in common[:10]} == set(example.questions[0].answers)
        assert common[9][1] >= 2 * common[10][1]
    for example in made["fwe"]:
        words = tokenizer.decode(example.tokens).split("words.")[1].replace(".", " ").split()
        common = Counter(words).most_common(4)
        assert [word for word, _ in common[:3]] == list(example.questions[0].answers)
        assert common[2][1] > common[3][1]


def test_shares_of_reference_strings(made: dict[str, list[Example]]) -> None:
    question = made["niah_multivalue"][0].questions[0]
    one, two, *_ = question.answers
    assert TASKS["niah_multivalue"]().score(f"{one} and {two} and 1234567", question) == 0.5
    code = made["niah_single_3"][0].questions[0]
    assert TASKS["niah_single_3"]().score(code.answers[0].upper(), code) == 1.0


def qa_file(path: Path, lines: list[Any]) -> Path:
    file = path / "qa.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def test_a_document_with_the_answer_stands_among_others_without_it(tokenizer: Any, tmp_path: Path) -> None:
    lines = [
        {
            "question": f"Who lives in house {i}?",
            "answers": [f"Mr. Grey{i}"],
            "context": f"House {i}: Mr. Grey{i}. " * 8,
        }
        for i in range(12)
    ]
    task, wanted = TASKS["qa"](), Wanted(700, 5, file=qa_file(tmp_path, lines))
    for i, example in enumerate(task.examples(tokenizer, wanted)):
        text = tokenizer.decode(example.tokens)
        assert longest(example) == 700 and text.count(lines[i]["context"]) == 1
        assert task.score(f" It is mr. grey{i}.", example.questions[0]) == 1.0
        assert task.score(" Mr. Green", example.questions[0]) == 0.0


WRONG = {
    "no question": ({"answers": ["a"], "context": "c"}, "line 2 of {file}, expected field 'question' with a text"),
    "no answers": (
        {"question": "q", "answers": [], "context": "c"},
        "line 2 of {file}, expected field 'answers' with a list",
    ),
    "no context": ({"question": "q", "answers": ["a"]}, "line 2 of {file}, expected field 'context' with a text"),
    "no object": (["q"], "in line 2 of {file}, expected a JSON object"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_line_of_a_file_is_named(wrong: str, tokenizer: Any, tmp_path: Path) -> None:
    line, message = WRONG[wrong]
    file = qa_file(tmp_path, [{"question": "q", "answers": ["a"], "context": "c"}, line])
    with pytest.raises(ConfigError, match=re.escape(message.format(file=file))):
        TASKS["qa"]().examples(tokenizer, Wanted(300, 5, file=file))


@pytest.mark.parametrize("name", [*HIDDEN, "cwe", "fwe", "agreement", "recovery"])
def test_what_does_not_fit_is_refused(name: str, tokenizer: Any, texts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        TASKS[name]().examples(tokenizer, Wanted(20, 1, steps=1, texts=texts))


def test_text_of_ones_own_is_cut_at_sentences_round_and_round(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mill.txt"
    file.write_text(" The mill stood there. It was old." * 5, encoding="utf-8")
    haystack = Haystack.of(tokenizer, Wanted(10, 1, texts=(str(file),)))
    body = haystack.cut(random.Random(0), 500)
    assert len(body) == 500 > len(haystack.tokens)
    assert tokenizer.decode(body).startswith((" The mill", " It was", "The mill"))
    hidden = haystack.hide(body, [[7, 7], [8]], [1.0, 0.0])
    assert [token for token in hidden if token not in (7, 8)] == [token for token in body if token not in (7, 8)]
    with pytest.raises(ConfigError, match=r"No such file or directory.*, expected a text file"):
        Haystack.of(tokenizer, Wanted(10, 1, texts=("/no/such",)))
    file.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="got a text without a word"):
        Haystack.of(tokenizer, Wanted(10, 1, texts=(str(file),)))
