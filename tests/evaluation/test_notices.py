"""What the library notices in every cell of a grid is said once."""

import logging

import pytest
import torch
from transformers import MaxLengthCriteria

from attnpred.evaluation.notices import each_once


def test_a_notice_is_said_once_in_a_run(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("attnpred")
    for _ in range(2):
        with each_once():
            for number in (1, 2, 1, 1):
                logger.warning("notice %d", number)
    logger.warning("notice 1")
    assert caplog.messages == [*["notice 1", "notice 2"] * 2, "notice 1"]


def test_an_alarm_about_the_length_is_said_in_our_words(caplog: pytest.LogCaptureFixture) -> None:
    """The alarm of the transformers that is installed: another name of its logger would let it through."""
    with each_once():
        for longest in (11, 12):  # it says each text once
            MaxLengthCriteria(99, longest)(torch.zeros(1, 20, dtype=torch.int64), torch.zeros(1, 5))
    assert caplog.messages == [
        "a text and its answer are longer than what the model was made for: it may do worse there"
    ]
