"""What `chat` and `generate` share: a model, attached, and a conversation about the text of a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpred import checks
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.reading import read_text

if TYPE_CHECKING:
    from attnpred.serving.conversation import Conversation


@contextmanager
def about_text(
    model: str,
    document: Path | None,
    *,
    policy: str,
    predictor: str | None,
    config: CacheConfig,
    dtype: str,
    weights: str | None = None,
    most: int | None = None,
    kept: int | None = None,
    chunk: int | None = None,
) -> Iterator["Conversation"]:
    """Load a model and give a conversation about a file; None: about nothing. The model is attached meanwhile.

    most: tokens of the document that are read. kept: bytes of documents that are kept. chunk: tokens that are
    read in one call. Raises `ConfigError`.
    """
    text = "" if document is None else read_text(document)
    if document is not None and not text.strip():
        raise ConfigError(f"got an empty document in {document}, expected some text")
    if most is not None:
        checks.whole("max_document_tokens", most, 1, checks.TOKENS)
    limit = None if kept is None else checks.whole("keep_limit", kept, 0, checks.BYTES)

    import sys

    from attnpred.hf import attach, load_model, make_policy
    from attnpred.serving.conversation import Conversation
    from attnpred.serving.kept import LIMIT, KeptTexts
    from attnpred.serving.reader import CHUNK, Reader

    lm, tokenizer = load_model(model, dtype=dtype)
    chosen = make_policy(policy, predictor, lm.config, config)
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    reader = Reader(lm, KeptTexts.of_user(LIMIT if limit is None else limit), Bar(), chunk or CHUNK)
    with attach(lm, policy=chosen, config=config, weights=weights):
        if most is not None:
            text = beginning(tokenizer, text, most)
        conversation = Conversation(reader, tokenizer, text, chosen, config, context)
        if conversation.turns.note:
            tell(f"note: {conversation.turns.note}")
        compile_kernels(lm.device.type)
        with conversation:
            yield conversation


def compile_kernels(device: str) -> None:
    """Compile what a model on `device` needs, before anybody waits for its second token; say so where that takes time."""
    from attnpred.kernels.prepare import prepare, takes_time

    if takes_time(device):
        tell("compiling kernels for this processor, once; this takes half a minute")
    prepare(device)


def beginning(tokenizer: Any, text: str, most: int) -> str:
    """Return the first `most` tokens of a text, and say so if there are more."""
    ids = tokenizer(text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) <= most:
        return text
    tell(f"note: of the {len(ids)} tokens of the document the first {most} are read")
    found: str = tokenizer.decode(ids[:most])
    return found


def tell(line: str) -> None:
    """Say a line on stderr, beside a progress bar if there is one."""
    import sys

    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


class Bar:
    """A progress bar on stderr, in a terminal, for each text that is read."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if not done:
            self.bar = tqdm(total=total, unit=" tokens", desc="reading", disable=None, leave=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
