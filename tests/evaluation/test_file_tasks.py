"""Tasks of files: prompts of exact length, the right answers score 1, and a wrong file is named with its line."""

import json
import math
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from attnpred.errors import ConfigError, MissingExtraError
from attnpred.evaluation.tasks import TASKS, Example, Item, Wanted
from attnpred.evaluation.tasks.gsm8k import Gsm8k, final_number
from attnpred.evaluation.tasks.hub import hub_rows
from attnpred.evaluation.tasks.longbench import DATASETS, LongBench
from attnpred.evaluation.tasks.prompts import prompt, without_middle
from attnpred.evaluation.tasks.wikitext import WikiText
from attnpred.hf import load_model

DATA = Path(__file__).parent / "data"
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
FILES = {
    "longbench": "longbench.jsonl",
    "ruler_file": "ruler.jsonl",
    "ruler_file_qa": "ruler.jsonl",
    "gsm8k": "gsm8k.jsonl",
    "math500": "math500.jsonl",
    "aime24": "aime24.jsonl",
}
FORMS: dict[str, Callable[[Sequence[str]], str]] = {  # of a right answer
    "ruler_file": " ".join,
    "math500": lambda answers: rf"So it is \boxed{{{answers[0]}}}.",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model("demo")[1]


@pytest.fixture
def chat_tokenizer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    return tokenizer


def wanted(name: str, length: int = 2048, **others: Any) -> Wanted:
    if name == "longbench":
        pytest.importorskip("rouge")  # one of its examples is a summary
    return Wanted(length, others.pop("count", 10**9), file=DATA / FILES[name], **others)


class Echo:
    """A session that answers what it is told to, and predicts every token alike."""

    def __init__(self, tokenizer: Any, answers: Sequence[str] = ()) -> None:
        self.tokenizer, self.answers = tokenizer, list(answers)
        self.read_tokens: list[int] = []

    def read(self, tokens: Sequence[int]) -> None:
        self.read_tokens.append(len(tokens))

    def fork(self, cache: None) -> None:
        return None

    def ask(self, cache: None, question: Any) -> str:
        return self.answers.pop(0)

    def follow(self, cache: None, tokens: Sequence[int]) -> torch.Tensor:
        return torch.full((len(tokens), 4096), -math.log(4096))


def items(name: str, tokenizer: Any, answers: Sequence[str], examples: list[Example]) -> list[Item]:
    session: Any = Echo(tokenizer, answers)
    return [item for example in examples for item in TASKS[name]().run(session, example)]


@pytest.mark.parametrize("name", FILES)
def test_the_truth_scores_one_and_nothing_scores_zero(name: str, tokenizer: Any) -> None:
    settings = {"length": 700} if name == "gsm8k" else {}
    examples = TASKS[name]().examples(tokenizer, wanted(name, **settings))
    form = FORMS.get(name, lambda answers: answers[0])
    truths = [form(question.answers) for example in examples for question in example.questions]
    values = [item.value for item in items(name, tokenizer, truths, examples)]
    assert values == pytest.approx([1.0] * len(truths), abs=1e-6)  # ROUGE divides by a little more
    assert [item.value for item in items(name, tokenizer, ["?"] * len(truths), examples)] == [0.0] * len(truths)
    assert len({example.name for example in examples}) == len(examples)
    assert examples == TASKS[name]().examples(tokenizer, wanted(name, **settings))
    assert examples[:1] == TASKS[name]().examples(tokenizer, wanted(name, count=1, **settings))


@pytest.mark.parametrize("name", FILES)
def test_what_is_asked_stands_in_the_prompt(name: str, tokenizer: Any) -> None:
    rows = [json.loads(line) for line in (DATA / FILES[name]).read_text().splitlines()]
    for row, example in zip(rows, TASKS[name]().examples(tokenizer, wanted(name)), strict=False):
        text = tokenizer.decode(example.tokens)
        asked = [row[field] for field in ("input", "context", "question", "problem") if field in row]
        assert all(part.strip() in text for part in asked), (row, text)


def test_longbench_has_the_published_table() -> None:
    sixteen = (
        "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique gov_report qmsum multi_news trec triviaqa samsum"
    )
    assert list(DATASETS) == [*sixteen.split(), "passage_count", "passage_retrieval_en", "lcc", "repobench-p"]
    assert [entry.new_tokens for entry in DATASETS.values()] == [128, 128, 64, 32, 32, 32, 512, 512, 512, 64, 32, 128, 32, 32, 64, 64]  # fmt: skip
    assert all("{context}" in entry.template for entry in DATASETS.values())


def test_longbench_scores_by_dataset(tokenizer: Any) -> None:
    examples = LongBench().examples(tokenizer, wanted("longbench"))
    answers = [
        "finch",
        "The ferry stopped",
        "\nDistance, linear measure\nDate",
        "Paragraph 2 or 3",
        "2",
        "# code\n    return area(a, c) * c",
    ]
    found = items("longbench", tokenizer, answers, examples)
    assert [round(item.value, 2) for item in found] == [1.0, 0.5, 1.0, 0.5, 1.0, 0.96]
    assert all("classes" not in item.labels for item in found)
    assert [item.labels["dataset"] for item in found] == ["hotpotqa", "multi_news", "trec", "passage_retrieval_en", "passage_count", "lcc"]  # fmt: skip


def test_summaries_need_what_they_are_scored_with_before_anything_is_read(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnpred.evaluation.metrics.find_spec", lambda name: None)
    asked = Wanted(2048, 1, file=DATA / FILES["longbench"])
    assert len(LongBench().examples(tokenizer, asked)) == 1  # a question, and no summary
    with pytest.raises(MissingExtraError, match=r"got no module 'rouge', .*: pip install 'attnpred\[eval\]'"):
        LongBench().examples(tokenizer, replace(asked, count=2))


def test_a_long_prompt_loses_its_middle(tokenizer: Any) -> None:
    whole = LongBench().examples(tokenizer, wanted("longbench"))[0].tokens
    assert LongBench().examples(tokenizer, wanted("longbench", 41))[0].tokens == whole[:20] + whole[-21:]
    assert LongBench().examples(tokenizer, wanted("longbench", len(whole)))[0].tokens == whole
    for length in range(1, 9):
        assert len(without_middle(list(range(8)), length)) == length


def test_chat_templates_keep_the_length(chat_tokenizer: Any) -> None:
    text = "a word and another one " * 30
    ids = prompt(chat_tokenizer, text, chat=True, length=40, begin=" It is")
    said = chat_tokenizer.decode(ids)
    assert len(ids) == 40 and said.startswith("<user> a word") and said.endswith("one \n<model> It is")
    whole = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert chat_tokenizer.decode(prompt(chat_tokenizer, text, chat=True)) == whole
    examples = LongBench().examples(chat_tokenizer, wanted("longbench", chat=True))
    begins = [chat_tokenizer.decode(example.tokens).startswith("<user>") for example in examples]
    assert begins == [True, True, False, True, True, False]  # lists of examples and code are there to be continued
    with pytest.raises(ConfigError, match=r"got length 3, expected more than .* the chat template alone"):
        prompt(chat_tokenizer, text, chat=True, length=3)


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="got a tokenizer without a chat template, expected one: give --no-chat"):
        TASKS["gsm8k"]().examples(tokenizer, wanted("gsm8k", 700, chat=True))


def test_ruler_leaves_out_what_is_too_long_and_counts_what_was_found(tokenizer: Any) -> None:
    every = TASKS["ruler_file"]().examples(tokenizer, wanted("ruler_file"))
    sizes = [len(example.tokens) for example in every]
    fitting = TASKS["ruler_file"]().examples(tokenizer, wanted("ruler_file", sorted(sizes)[1]))
    assert [example.name for example in fitting] == [str(i) for i in range(3) if sizes[i] <= sorted(sizes)[1]]
    with pytest.raises(ConfigError, match=rf"got length 20 for task 'ruler_file', expected at least {min(sizes)}"):
        TASKS["ruler_file"]().examples(tokenizer, wanted("ruler_file", 20))
    assert items("ruler_file", tokenizer, [" 4185"], every[:1])[0].value == 0.5
    assert items("ruler_file_qa", tokenizer, [" 4185"], every[:1])[0].value == 1.0


def test_the_begin_of_an_answer_may_stand_apart(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"input": "Where?", "answer_prefix": " It is", "outputs": ["here"]}))
    example = TASKS["ruler_file"]().examples(tokenizer, Wanted(99, 9, file=path))[0]
    assert tokenizer.decode(example.tokens) == "Where? It is"


def test_gsm8k_has_other_questions_for_examples(tokenizer: Any) -> None:
    examples = Gsm8k(shots=2).examples(tokenizer, wanted("gsm8k"))
    assert len(examples) == 4  # six lines, of which two are examples
    for example in examples:
        text = tokenizer.decode(example.tokens)
        assert text.count("Question:") == 3 and text.endswith("\nAnswer:")
        assert text.count("####") == 2 and example.questions[0].stop == "Question:"
        asked = text.rpartition("Question:")[2]
        assert text.count(asked.removesuffix("\nAnswer:")) == 1
    assert "#### -4\n\n" in tokenizer.decode(examples[0].tokens) and "#### 480\n\n" in tokenizer.decode(
        examples[0].tokens
    )


def test_gsm8k_takes_the_published_examples_or_what_fits(tokenizer: Any, tmp_path: Path) -> None:
    lines = (DATA / "gsm8k.jsonl").read_text().splitlines()
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(lines * 20))
    for length, shots in ((4096, 25), (8192, 47), (16384, 97)):
        example = Gsm8k().examples(tokenizer, Wanted(length, 1, file=path))[0]
        assert tokenizer.decode(example.tokens).count("####") == shots == example.questions[0].labels["shots"]
        assert example.questions[0].new_tokens == 150
    for length in (300, 500, 900):
        example = Gsm8k().examples(tokenizer, Wanted(length, 1, file=path))[0]
        assert length - 100 < len(example.tokens) <= length
    with pytest.raises(ConfigError, match=r"got 6 lines in .*gsm8k.jsonl, expected 25 examples and a question"):
        Gsm8k().examples(tokenizer, wanted("gsm8k", 4096))
    other = Gsm8k(shots=30, shots_file=path).examples(tokenizer, wanted("gsm8k"))
    assert len(other) == 6  # every line is asked


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5 + 5 = 10.\n#### 12\n\nQuestion: 7", 12),
        ("it costs $1,234.50 in all.", Fraction("1234.5")),
        ("#### -4 degrees", -4),
        ("no number", None),
        ("#### none, but 3 before", 3),
        ("####", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: Any) -> None:
    assert final_number(text) == number


def test_long_answers_get_what_the_prompt_leaves(tokenizer: Any) -> None:
    for name in ("math500", "aime24"):
        for example in TASKS[name]().examples(tokenizer, wanted(name, 300)):
            assert len(example.tokens) + example.questions[0].new_tokens == 300
    solutions = [json.loads(line)["solution"] for line in (DATA / "math500.jsonl").read_text().splitlines()]
    examples = TASKS["math500"]().examples(tokenizer, wanted("math500"))
    assert [item.value for item in items("math500", tokenizer, solutions, examples)] == [1, 1]
    examples = TASKS["aime24"]().examples(tokenizer, wanted("aime24"))
    assert [item.value for item in items("aime24", tokenizer, [r"\boxed{33}", "It is 255"], examples)] == [1, 0]


def test_wikitext_is_cut_into_pieces_without_a_gap(tokenizer: Any) -> None:
    asked = Wanted(60, 3, file=DATA / "wikitext.txt", steps=8)
    examples = WikiText().examples(tokenizer, asked)
    ids = tokenizer((DATA / "wikitext.txt").read_text(), verbose=False)["input_ids"]
    assert [token for example in examples for token in example.tokens] == ids[: 3 * 69]
    every = WikiText().examples(tokenizer, replace(asked, count=10**9))
    assert len(every) == len(ids) // 69
    with pytest.raises(ConfigError, match=rf"got {len(ids)} tokens in .*wikitext.txt, expected at least 5009"):
        WikiText().examples(tokenizer, replace(asked, length=5000))


def test_wikitext_counts_what_is_predicted(tokenizer: Any) -> None:
    examples = WikiText().examples(tokenizer, Wanted(60, 2, file=DATA / "wikitext.txt", steps=8))
    session: Any = Echo(tokenizer)
    (found,) = WikiText().measure(session, examples, None)
    assert session.read_tokens == [60, 60]
    assert found.figures["perplexity"] == pytest.approx(4096)  # every token is as likely as any other
    for item, example in zip(found.items, examples, strict=True):
        assert item.value == pytest.approx(8 * 12 / len(tokenizer.decode(example.tokens[-8:]).encode()))
    assert len(WikiText().measure(session, examples, 1)[0].items) == 1


class Reader(Echo):
    """Knows a text, and minds that it gets it token after token; gives each next token 0.25 nats."""

    def __init__(self, tokenizer: Any, text: Sequence[int]) -> None:
        super().__init__(tokenizer)
        self.text = tuple(text)

    def follow(self, cache: None, tokens: Sequence[int]) -> torch.Tensor:
        begin = self.read_tokens[-1]
        assert tuple(tokens) == self.text[begin : begin + len(tokens)]
        rows = torch.full((len(tokens), 4096), -99.0)
        rows[range(len(tokens)), list(self.text[begin + 1 : begin + 1 + len(tokens)])] = -0.25
        return rows


def test_wikitext_scores_what_follows_each_token(tokenizer: Any) -> None:
    (example,) = WikiText().examples(tokenizer, Wanted(60, 1, file=DATA / "wikitext.txt", steps=8))
    session: Any = Reader(tokenizer, example.tokens)
    (item,) = WikiText().run(session, example)
    assert item.labels["nats"] == pytest.approx(8 * 0.25)


WRONG = [
    ("ruler_file", '{"input": "a", "outputs": ["b"]}\n{"input": "a"}', r"got input in line 2 of .*, expected field 'outputs' with a list"),
    ("ruler_file", '{"input": "a", "outputs": []}', r"got outputs=\[\] in line 1 of .*, expected field 'outputs' with a list of texts"),
    ("ruler_file", '{"input": 3, "outputs": ["b"]}', r"got input=3 in line 1 of .*, expected field 'input' with a text"),
    ("ruler_file", '\n\n{"input": ', r"got line 3 of .* that is not JSON, expected one JSON object per line"),
    ("ruler_file", '{"input": "a", "outputs": ["b"]}\n{"input": "a\\ud800"}', r"got line 2 of .* that is not JSON, .*half of a letter, .ud800, in a text"),
    ("ruler_file", '{"input": "a", "outputs": [1' + 400 * "0" + "]}", r"got line 1 of .* is no finite number"),
    ("gsm8k", "[" * 9999, r"got line 1 of .* with more than 64 levels of JSON"),
    ("ruler_file", "[1, 2]", r"got '\[1, 2\]' in line 1 of .*, expected a JSON object"),
    ("ruler_file", "\n", r"got .* without a line, expected one JSON object per line"),
    ("longbench", '{"dataset": "hotpot", "context": "", "input": "", "answers": ["a"]}', r"got dataset 'hotpot' in line 1 of .*, expected field 'dataset' with one of narrativeqa, "),
    ("longbench", '{"dataset": "trec", "context": "", "input": "", "answers": ["a"], "all_classes": null}', "expected field 'all_classes' with a list"),
    ("gsm8k", '{"question": "a", "answer": "5"}', r"got answer '5' in line 1 of .*, expected field 'answer' with a number after '####'"),
    ("gsm8k", '{"problem": "a"}', "got problem in line 1 of .*, expected field 'question' with a text"),
    ("math500", '{"problem": "a", "answer": null}', "expected field 'answer' with a text or a number"),
    ("aime24", '{"problem": "a", "answer": "1/2"}', "got answer '1/2' in line 1 of .*, expected field 'answer' with a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), WRONG)
def test_a_wrong_file_is_named_with_its_line(
    name: str, text: str, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        TASKS[name]().examples(tokenizer, Wanted(500, 9, file=path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_lines_end_at_newlines_alone_in_any_encoding(encoding: str, tokenizer: Any, tmp_path: Path) -> None:
    text = "été\x85été" if encoding == "latin-1" else "été\u2028été\x0b"
    line = json.dumps({"input": text, "outputs": ["b"]}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(f"{line}\n{line}\n".encode(encoding))
    made = TASKS["ruler_file"]().examples(tokenizer, Wanted(500, 9, file=tmp_path / "rows.jsonl"))
    assert [tokenizer.decode(example.tokens) for example in made] == [text, text]


def test_other_files_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("gsm8k", "wikitext"):
        with pytest.raises(ConfigError, match="which is no UTF-16 from byte 0 on, expected a text file"):
            TASKS[name]().examples(tokenizer, Wanted(500, 9, file=tmp_path / "binary"))
        with pytest.raises(ConfigError, match=f"got task '{name}' with file .*none, expected a file that exists"):
            TASKS[name]().examples(tokenizer, Wanted(500, 9, file=tmp_path / "none"))


def test_datasets_of_the_hub(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rows = [json.loads(line) for line in (DATA / "ruler.jsonl").read_text().splitlines()]

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        if name == "some/gone":
            raise ConnectionError("no route\nto host")
        return [] if name == "some/empty" else rows

    fake: Any = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    from_hub = TASKS["ruler_file"]().examples(tokenizer, Wanted(2048, 9, file=Path("hf:some/set/part@dev")))
    assert from_hub == TASKS["ruler_file"]().examples(tokenizer, wanted("ruler_file"))
    assert asked == [("some/set", "part", "dev")]
    hub_rows("hf:some/set")
    assert asked[-1] == ("some/set", None, "test")
    with pytest.raises(ConfigError, match=r"got dataset 'hf:some/gone', expected one that can .*: no route; or give a"):
        hub_rows("hf:some/gone")
    with pytest.raises(ConfigError, match="got dataset 'hf:some/empty' without a row"):
        hub_rows("hf:some/empty")
    with pytest.raises(ConfigError, match="got dataset 'hf:some', expected hf:OWNER/NAME"):
        hub_rows("hf:some")
    with pytest.raises(ConfigError, match="got problem in row 1 of hf:some/set, expected field 'outputs'"):
        rows[:] = [{"problem": "a"}]
        TASKS["ruler_file"]().examples(tokenizer, Wanted(99, 9, file=Path("hf:some/set")))


def test_the_hub_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingExtraError, match=r"got no module 'datasets', expected it installed: pip install 'attnpred\[eval\]'"
    ):
        hub_rows("hf:some/set")
