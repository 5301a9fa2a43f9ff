"""LongBench (arXiv 2308.14508): its 16 English and code datasets, with their published metrics and lengths of answers.

A file has one example per line: `input` (the question), `context`, `answers`, `dataset`, `all_classes` and `_id`. What a
dataset is asked and how it is scored is a line of `DATASETS`. The prompts have the published structure (what is
to be done, the context, the question, in which form to answer) in words of our own, so scores are to be compared
with each other, and not with published ones.

A prompt longer than the wanted length loses its middle, as published. The published lists of examples and code are
not put into a chat template, as they are there to be continued.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from attnpred.errors import ConfigError
from attnpred.evaluation import metrics
from attnpred.evaluation.tasks.base import Example, Item, Question, Session, Task, Wanted
from attnpred.evaluation.tasks.jsonl import Row, read_rows
from attnpred.evaluation.tasks.prompts import prompt


@dataclass(frozen=True, slots=True)
class Dataset:
    """template: with {context} and {input}; metric: of an answer, a truth, and the classes that there are.

    first_line: only the first line of an answer counts, as the others would be further examples. continued: see above.
    """

    template: str
    new_tokens: int
    metric: Callable[[str, str, Sequence[str]], float]
    first_line: bool = False
    continued: bool = False


def _plain(metric: Callable[[str, str], float]) -> Callable[[str, str, Sequence[str]], float]:
    """Return a metric that has no use for classes."""
    return lambda answer, truth, classes: metric(answer, truth)


_F1, _ROUGE = _plain(metrics.qa_f1), _plain(metrics.rouge_l)
_CODE, _COUNT, _RETRIEVAL = _plain(metrics.edit_similarity), _plain(metrics.count), _plain(metrics.retrieval)

_PASSAGES = (
    "Find the answer to the question in the passages. Write the answer alone, and nothing else.\n\nPassages:\n{context}\n\n"
    "Find the answer to the question in the passages above. Write the answer alone, and nothing else.\n\n"
    "Question: {input}\nAnswer:"
)

DATASETS = {
    "narrativeqa": Dataset(
        "Below is a story or a film script, and a question about it. Answer as briefly as you can, with a single phrase if "
        "that is enough, and explain nothing.\n\nStory: {context}\n\nNow answer the question about the story as briefly as "
        "you can, with a single phrase if that is enough, and explain nothing.\n\nQuestion: {input}\n\nAnswer:",
        128,
        _F1,
    ),
    "qasper": Dataset(
        "Below is a scientific article, and a question about it. Answer as briefly as you can, with a phrase or a sentence. "
        'Where the article has no answer, write "unanswerable"; to a yes or no question, write "yes", "no" or "unanswerable". '
        "Explain nothing.\n\nArticle: {context}\n\nNow answer the question about the article in the same way: a phrase or a "
        'sentence, "yes", "no" or "unanswerable", and no explanation.\n\nQuestion: {input}\n\nAnswer:',
        128,
        _F1,
    ),
    "multifieldqa_en": Dataset(
        "Read this text, and answer a short question about it.\n\n{context}\n\nAnswer this question about the text above. "
        "Write the answer alone, and nothing else.\n\nQuestion: {input}\nAnswer:",
        64,
        _F1,
    ),
    "hotpotqa": Dataset(_PASSAGES, 32, _F1),
    "2wikimqa": Dataset(_PASSAGES, 32, _F1),
    "musique": Dataset(_PASSAGES, 32, _F1),
    "gov_report": Dataset(
        "Below is a report of a government agency. Summarise it on one page.\n\nReport:\n{context}\n\n"
        "Now summarise the report on one page.\n\nSummary:",
        512,
        _ROUGE,
    ),
    "qmsum": Dataset(
        "Below are the minutes of a meeting, and a question or task about it. Answer in one or several sentences.\n\n"
        "Minutes:\n{context}\n\nNow answer about the meeting above, in one or several sentences.\n\n"
        "Question: {input}\nAnswer:",
        512,
        _ROUGE,
    ),
    "multi_news": Dataset(
        "Below are several news articles. Summarise all of them on one page.\n\nArticles:\n{context}\n\n"
        "Now summarise all the articles on one page.\n\nSummary:",
        512,
        _ROUGE,
    ),
    "trec": Dataset(
        "Name the type of the last question. Examples of questions with their types come first.\n\n{context}\n{input}",
        64,
        metrics.classification,
        first_line=True,
        continued=True,
    ),
    "triviaqa": Dataset(
        "Answer the last question from its passage. Write the answer alone, and nothing else. Examples come first.\n\n"
        "{context}\n\n{input}",
        32,
        _F1,
        first_line=True,
        continued=True,
    ),
    "samsum": Dataset(
        "Summarise the last dialogue in a few short sentences. Examples come first.\n\n{context}\n\n{input}",
        128,
        _ROUGE,
        first_line=True,
        continued=True,
    ),
    "passage_count": Dataset(
        "Below are numbered paragraphs from Wikipedia, some of them more than once. Read them all, find out which are the "
        "same, and say how many different paragraphs there are.\n\n{context}\n\nHow many paragraphs are left when each is "
        "kept only once? Write the number alone, such as 1, 2 or 3.\n\nThe number of different paragraphs is:",
        32,
        _COUNT,
    ),
    "passage_retrieval_en": Dataset(
        "Below are 30 paragraphs from Wikipedia, and a summary of one of them. Find out which one.\n\n{context}\n\n"
        'Summary:\n\n{input}\n\nWrite the number of the paragraph that was summarised, in the form "Paragraph 1", '
        '"Paragraph 2" and so on.\n\nThe summary belongs to:',
        32,
        _RETRIEVAL,
    ),
    "lcc": Dataset("Continue this code.\n{context}Next line of code:\n", 64, _CODE, continued=True),
    "repobench-p": Dataset("Continue this code.\n{context}{input}Next line of code:\n", 64, _CODE, continued=True),
}


@final
@dataclass(frozen=True, slots=True)
class LongBench(Task):
    """LongBench: questions, summaries and code, from a file of one of its datasets, or of several."""

    metric: ClassVar[str] = "longbench_score"
    needs_file: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        rows = read_rows(wanted, "longbench")
        read = [(row, _name(row), row.text("context"), row.text("input"), row.texts("answers")) for row in rows]
        found = []
        for i, (row, name, context, asked, answers) in enumerate(read[: wanted.count]):
            dataset = DATASETS[name]
            if dataset.metric is _ROUGE:
                metrics.need_rouge()
            text = dataset.template.format(context=context, input=asked)
            tokens = prompt(tokenizer, text, chat=wanted.chat and not dataset.continued, length=wanted.length)
            labels: dict[str, Any] = {"dataset": name, "tokens": len(tokens)}
            if dataset.metric is metrics.classification:
                labels["classes"] = row.texts("all_classes")
            found.append(
                Example(
                    str(row.values.get("_id", i)), tokens, (Question((), answers, dataset.new_tokens, labels=labels),)
                )
            )
        return found

    def score(self, answer: str, question: Question) -> float:
        """Return the metric of the dataset, for the truth that it is highest with."""
        dataset = DATASETS[question.labels["dataset"]]
        text = answer.lstrip("\n").partition("\n")[0] if dataset.first_line else answer
        classes = question.labels.get("classes", ())
        return max(dataset.metric(text, truth, classes) for truth in question.answers)

    def run(self, session: Session, example: Example) -> Iterator[Item]:
        """As for every task; but the classes, which are long, stay out of the items."""
        for item in Task.run(self, session, example):
            labels = {name: value for name, value in item.labels.items() if name != "classes"}
            yield dataclasses.replace(item, labels=labels)


def _name(row: Row) -> str:
    """Return the line of `DATASETS`; the files of LongBench-E have `_e` after the name. Raises `ConfigError`."""
    name = row.text("dataset").removesuffix("_e")
    if name not in DATASETS:
        raise ConfigError(
            f"got dataset {name!r} in {row.place}, expected field 'dataset' with one of {', '.join(DATASETS)}"
        )
    return name
