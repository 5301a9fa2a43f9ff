"""Notices of the library, each once in a run: a grid makes the same policy for every cell, and it would repeat them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("attnpred")


@contextmanager
def each_once() -> Iterator[None]:
    """Let every message of the library through once as long as the block lasts."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        known = message in said
        said.add(message)
        return not known

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
