"""Selection policies, one file each. To add one: its file, and its line in `POLICIES`; the contract tests pick it up."""

from attnpred.policies.base import Policy
from attnpred.policies.ema import Ema
from attnpred.policies.full import Full
from attnpred.policies.last_step import LastStep
from attnpred.policies.oracle import Oracle
from attnpred.policies.predicted import Predicted
from attnpred.policies.streaming import Streaming

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "streaming": Streaming,
    "last_step": LastStep,
    "ema": Ema,
    "oracle": Oracle,
    "predicted": Predicted,
}
