"""Selection policies, one file each. To add one: its file, and its line in `POLICIES`; the contract tests pick it up."""

from typing import Any

from attnpred.policies.base import Policy
from attnpred.policies.ema import Ema
from attnpred.policies.freekv import FreeKV
from attnpred.policies.full import Full
from attnpred.policies.h2o import H2O
from attnpred.policies.last_step import LastStep
from attnpred.policies.mean_key import MeanKey, MeanKeyLast
from attnpred.policies.oracle import Oracle
from attnpred.policies.predicted import Predicted
from attnpred.policies.quest import Quest
from attnpred.policies.recycled import Recycled
from attnpred.policies.streaming import Streaming

POLICIES: dict[str, type[Policy[Any]]] = {
    "full": Full,
    "streaming": Streaming,
    "last_step": LastStep,
    "ema": Ema,
    "h2o": H2O,
    "mean_key_last": MeanKeyLast,
    "mean_key": MeanKey,
    "quest": Quest,
    "freekv": FreeKV,
    "recycled": Recycled,
    "oracle": Oracle,
    "predicted": Predicted,
}
