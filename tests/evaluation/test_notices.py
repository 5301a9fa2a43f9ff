"""What the library notices in every cell of a grid is said once."""

import logging

import pytest

from attnpred.evaluation.notices import each_once


def test_a_notice_is_said_once_in_a_run(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("attnpred")
    for _ in range(2):
        with each_once():
            for number in (1, 2, 1, 1):
                logger.warning("notice %d", number)
    logger.warning("notice 1")
    assert caplog.messages == [*["notice 1", "notice 2"] * 2, "notice 1"]
