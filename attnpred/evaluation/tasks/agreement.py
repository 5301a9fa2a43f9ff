"""How long and how closely a policy goes on like the full cache: first divergence, and KL per token.

The reference is the full cache's own greedy continuation of book text by `steps` tokens (or fewer, where the text ends).
It is fed to the policy token by token; KL(full || policy), in nats per token, compares what both expect next, and the
first token on which their greedy choices differ is where a free continuation would leave the reference. An item is a
document; its value is the mean KL.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from attnpred.errors import ConfigError
from attnpred.evaluation.tasks.base import Example, Item, Question, Session, Task, Wanted
from attnpred.evaluation.tasks.haystack import Haystack, opening, room_for


@final
@dataclass(frozen=True, slots=True)
class Agreement(Task):
    """KL per token to the full cache on its own greedy continuation, and where the first token differs."""

    metric: ClassVar[str] = "kl_per_token"
    lower_is_better: ClassVar[bool] = True
    reads_texts: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        if wanted.steps < 2:
            raise ConfigError(f"got {wanted.steps} steps for task 'agreement', expected at least 2")
        haystack, begin = Haystack.of(tokenizer, wanted), opening(tokenizer)
        room = room_for(wanted, "agreement", len(begin))
        found = []
        for i in range(wanted.count):
            rng = random.Random(f"{wanted.seed}/agreement/{wanted.length}/{i}")
            body = haystack.cut(rng, room)
            found.append(Example(str(i), (*begin, *body), (Question((), (), wanted.steps),)))
        return found

    def prepare(self, session: Session, example: Example) -> Example:
        """Let the full cache continue the text, and note what it expected after each token of that."""
        document = session.read(example.tokens)
        tokens = session.generate(session.fork(document), example.questions[0])
        return replace(example, reference=(tokens, session.follow(document, tokens[:-1])))

    def score(self, answer: str, question: Question) -> float:
        raise NotImplementedError("nothing is asked")

    def run(self, session: Session, example: Example) -> Iterator[Item]:
        """Feed the reference; compare what is expected after each of its tokens."""
        tokens, expected = example.reference
        found = session.follow(session.read(example.tokens), tokens[:-1])
        kl = (expected.exp() * (expected - found)).sum(-1).clamp_min(0)
        same = (found.argmax(-1) == expected.argmax(-1)).tolist()
        first = same.index(False) if False in same else None
        labels = {
            "first_divergence": first,
            "agreed": sum(same) / len(same),
            "steps": len(same),
            "kl_last_quarter": float(kl[-max(1, len(kl) // 4) :].mean()),
        }
        yield Item(example.name, float(kl.mean()), labels)
