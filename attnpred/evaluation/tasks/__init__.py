"""The tasks of the grid, by name. To add one: its file, and its line in `TASKS`, which makes it with its settings."""

from collections.abc import Callable
from functools import partial

from attnpred.evaluation.tasks.agreement import Agreement
from attnpred.evaluation.tasks.answers import Aime24, Math500
from attnpred.evaluation.tasks.base import Example, Item, Measured, Question, Session, Task, Wanted
from attnpred.evaluation.tasks.chain import Chain
from attnpred.evaluation.tasks.facts import Facts
from attnpred.evaluation.tasks.gsm8k import Gsm8k
from attnpred.evaluation.tasks.hops import Hops
from attnpred.evaluation.tasks.longbench import LongBench
from attnpred.evaluation.tasks.lookup import Lookup
from attnpred.evaluation.tasks.needle import Needle
from attnpred.evaluation.tasks.passkey import Passkey
from attnpred.evaluation.tasks.perplexity import Perplexity
from attnpred.evaluation.tasks.recite import Recite
from attnpred.evaluation.tasks.recovery import RecoveryTask
from attnpred.evaluation.tasks.ruler_file import RulerFile
from attnpred.evaluation.tasks.ruler_niah import Niah
from attnpred.evaluation.tasks.ruler_qa import QuestionAnswering
from attnpred.evaluation.tasks.ruler_tracking import VariableTracking
from attnpred.evaluation.tasks.ruler_words import CommonWords, FrequentWords
from attnpred.evaluation.tasks.wikitext import WikiText

TASKS: dict[str, Callable[[], Task]] = {
    "facts1": partial(Facts, count=1),
    "facts4": partial(Facts, count=4),
    "facts4_prompt": partial(Facts, count=4, in_prompt=True),
    "facts_turns": partial(Facts, count=4, in_turn=True),
    "hops": Hops,
    "chain": Chain,
    "recite": Recite,
    "needle": Needle,
    "needle4": partial(Needle, needles=4),
    "needle_values": partial(Needle, values=3),
    "passkey": Passkey,
    "lookup": Lookup,
    "niah_single_1": partial(Niah, haystack="noise"),
    "niah_single_2": Niah,
    "niah_single_3": partial(Niah, value="uuid"),
    "niah_multikey_1": partial(Niah, keys=4),
    "niah_multikey_2": partial(Niah, haystack="needles"),
    "niah_multikey_3": partial(Niah, haystack="needles", key="uuids", value="uuid"),
    "niah_multivalue": partial(Niah, values=4),
    "niah_multiquery": partial(Niah, keys=4, queries=4),
    "vt": VariableTracking,
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "qa": QuestionAnswering,
    "perplexity": Perplexity,
    "agreement": Agreement,
    "recovery": RecoveryTask,
    "longbench": LongBench,
    "ruler_file": RulerFile,
    "ruler_file_qa": partial(RulerFile, any_of=True, new_tokens=32),
    "gsm8k": Gsm8k,
    "math500": Math500,
    "aime24": Aime24,
    "wikitext": WikiText,
}

__all__ = ["TASKS", "Example", "Item", "Measured", "Question", "Session", "Task", "Wanted"]
