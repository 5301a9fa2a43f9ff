"""Notices in a run of a grid, each once: every cell makes the same policies, and would repeat what they say.

transformers alarms when an answer goes beyond the length that a model was made for; a grid may be asked for just that, so
it is said in our words.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("attnpred")
LENGTH_ALARM = "transformers.generation.stopping_criteria"
"""Who alarms, and says nothing else."""


@contextmanager
def each_once() -> Iterator[None]:
    """Let every message of the library through once as long as the block lasts, and one of transformers' in other words."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        known = message in said
        said.add(message)
        return not known

    def in_our_words(record: logging.LogRecord) -> bool:
        logger.warning("a text and its answer are longer than what the model was made for: it may do worse there")
        return False

    alarms = logging.getLogger(LENGTH_ALARM)
    logger.addFilter(is_new)
    alarms.addFilter(in_our_words)
    try:
        yield
    finally:
        alarms.removeFilter(in_our_words)
        logger.removeFilter(is_new)
