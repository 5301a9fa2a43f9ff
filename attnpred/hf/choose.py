"""From names and loose settings to a `CacheConfig`, a policy and a predictor that fit the model and each other."""

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy
from attnpred.policies.predicted import Predicted
from attnpred.predictor.pretrained import Predictor, shipped

logger = logging.getLogger("attnpred")


def make_settings(settings: CacheConfig | None, overrides: dict[str, Any]) -> CacheConfig:
    """Return `settings`, or the defaults, with single fields replaced."""
    known = {name: getattr(settings or CacheConfig(), name) for name in CacheConfig.__dataclass_fields__}
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ConfigError(f"got setting {unknown[0]!r}, expected one of {', '.join(known)}")
    return CacheConfig(**(known | overrides))


def fingerprint(config: PreTrainedConfig) -> str:
    """Return what a predictor's config names to say which model it was trained for."""
    text = config.get_text_config(decoder=True)
    sizes = (text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.vocab_size)
    return "-".join([text.model_type, *map(str, sizes)])


def make_policy(
    policy: str | Policy, predictor: Predictor | str | Path | None, config: PreTrainedConfig, settings: CacheConfig
) -> Policy:
    """Return the policy of that name; `predicted` gets the given predictor, or the shipped one that fits best."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"got policy {policy!r}, expected one of {', '.join(POLICIES)}")
    if policy != "predicted":
        return POLICIES[policy]()
    if not isinstance(predictor, Predictor):
        predictor = Predictor.from_pretrained(predictor) if predictor is not None else _shipped_predictor(config)
    predictor.require(settings.block_size)
    return Predicted(predictor)


def _shipped_predictor(config: PreTrainedConfig) -> Predictor:
    available = [Predictor.from_pretrained(path) for path in shipped().values()]
    fitting = [p for p in available if p.config.fingerprint == fingerprint(config)]
    if fitting:
        return fitting[0]
    if not available:
        raise ConfigError(
            "got no predictor, and none is shipped: train one (attnpred capture, attnpred train) and pass predictor="
        )
    logger.warning(
        "no predictor was trained for this %s model: using the one of %s; `attnpred train` makes your own",
        config.model_type,
        available[0].config.base_model,
    )
    return available[0]
