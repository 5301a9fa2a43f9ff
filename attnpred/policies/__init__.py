"""Selection policies, one file each. To add one: its file, and its line in `POLICIES`; the contract tests pick it up."""

from typing import Any

from attnpred.policies.accumulated import Accumulated
from attnpred.policies.base import Policy
from attnpred.policies.cascading import Cascading
from attnpred.policies.ema import Ema
from attnpred.policies.fastgen import FastGen
from attnpred.policies.freekv import FreeKV
from attnpred.policies.full import Full
from attnpred.policies.h2o import H2O
from attnpred.policies.hip import HiP
from attnpred.policies.last_step import LastStep
from attnpred.policies.mean_key import MeanKey, MeanKeyLast
from attnpred.policies.oracle import Oracle
from attnpred.policies.pod import Pod
from attnpred.policies.predicted import Predicted
from attnpred.policies.quest import Quest
from attnpred.policies.recycled import Recycled
from attnpred.policies.seer import Seer
from attnpred.policies.sepllm import SepLLM
from attnpred.policies.snapkv import SnapKV
from attnpred.policies.streaming import Streaming
from attnpred.policies.subgen import SubGen
from attnpred.policies.tactic import Tactic
from attnpred.policies.tidal import TidalDecode

POLICIES: dict[str, type[Policy[Any]]] = {
    "full": Full,
    "streaming": Streaming,
    "last_step": LastStep,
    "ema": Ema,
    "accumulated": Accumulated,
    "h2o": H2O,
    "snapkv": SnapKV,
    "sepllm": SepLLM,
    "fastgen": FastGen,
    "cascading": Cascading,
    "subgen": SubGen,
    "mean_key_last": MeanKeyLast,
    "mean_key": MeanKey,
    "quest": Quest,
    "tactic": Tactic,
    "hip": HiP,
    "freekv": FreeKV,
    "recycled": Recycled,
    "tidal": TidalDecode,
    "pod": Pod,
    "oracle": Oracle,
    "seer": Seer,
    "predicted": Predicted,
}
