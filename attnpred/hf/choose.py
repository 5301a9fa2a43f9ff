"""From names and loose settings to a `CacheConfig`, a policy and a predictor that fit the model and each other."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError, UnsupportedModelError
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.policies.predicted import Predicted
from attnpred.predictor.layer_groups import LayerGroups
from attnpred.predictor.pretrained import Predictor, shipped
from attnpred.sharing import Sharing

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


def make_sharing(config: PreTrainedConfig, settings: CacheConfig, policy: Policy[Any]) -> Sharing | None:
    """Return how layers share keys, if `settings` say that they do. Raises `ConfigError`, `UnsupportedModelError`."""
    if settings.layer_groups is None:
        return None
    text = config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"got {text.model_type}, whose layers share keys already, expected no layer_groups")
    if settings.distant_gate is not None and not policy.is_dense:
        raise ConfigError("got distant_gate with a policy that selects blocks, expected pod or full: leave it out")
    if policy.evicts:
        raise ConfigError("got layer_groups with a policy that evicts, expected one that keeps all blocks")
    groups = LayerGroups.load(Path(settings.layer_groups))
    if groups.fingerprint != fingerprint(config):
        raise ConfigError(
            f"got {settings.layer_groups} of {groups.base_model} ({groups.fingerprint}) for {fingerprint(config)}, expected "
            "the same model: run attnpred analyse-layers on this one"
        )
    return Sharing(groups.leaders(), settings)


def check_budgets(config: PreTrainedConfig, settings: CacheConfig) -> None:
    """Raise `ConfigError` if budgets of layers or heads are not as many as the model has."""
    text = config.get_text_config(decoder=True)
    for name, given, has in (
        ("layer_budgets", settings.layer_budgets, text.num_hidden_layers),
        ("head_budgets", settings.head_budgets, getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
    ):
        if isinstance(given, tuple) and len(given) != has:
            raise ConfigError(f"got {len(given)} {name} for a model of {has}, expected one for each: give {has} numbers")


def make_policy(
    policy: str | Policy[Any], predictor: Predictor | str | Path | None, config: PreTrainedConfig, settings: CacheConfig
) -> Policy[Any]:
    """Return the policy of that name; `predicted` gets the given predictor, or the shipped one that fits best."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"got policy {policy!r}, expected one of {', '.join(POLICIES)}")
    if policy != "predicted":
        made = POLICIES[policy]
        return made.for_tokenizer(_tokenizer(config, policy)) if made.reads_tokens else made()
    chosen = _predictor(predictor, config)
    chosen.require(settings.block_size)
    return Predicted(chosen) if chosen.config.kind == "streaming" else PaperForecast(chosen)


def _tokenizer(config: PreTrainedConfig, policy: str) -> Any:
    """Return the tokenizer that lies where the model came from."""
    place = getattr(config, "_name_or_path", "") or getattr(config, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, TypeError):
        raise ConfigError(
            f"got policy {policy!r} and no tokenizer at {place!r}, expected one beside the model: give the policy itself, "
            f"made with {POLICIES[policy].__name__}.for_tokenizer(tokenizer)"
        ) from None


def _predictor(predictor: Predictor | str | Path | None, config: PreTrainedConfig) -> Predictor:
    """Return the given predictor, the shipped one of that name, or the shipped one that fits the model best."""
    if isinstance(predictor, Predictor):
        return predictor
    available = shipped()
    if predictor is not None:
        return Predictor.from_pretrained(available.get(str(predictor), predictor))
    candidates = [Predictor.from_pretrained(path) for path in available.values()]
    candidates = [candidate for candidate in candidates if candidate.config.kind == "streaming"]
    for candidate in candidates:
        if candidate.config.fingerprint == fingerprint(config):
            return candidate
    for candidate in candidates:
        if not candidate.config.layers:
            logger.warning(
                "no predictor was trained for this %s model: using the general one; `attnpred train` makes your own",
                config.model_type,
            )
            return candidate
    raise ConfigError(
        "got no general predictor among those shipped: train one (attnpred capture, attnpred train) and pass predictor="
    )
