"""From names and loose settings to a `CacheConfig`, a policy and a predictor that fit the model and each other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from attnpred.config import USUAL_BLOCK, CacheConfig
from attnpred.errors import ConfigError, UnsupportedModelError
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.policies.predicted import Predicted
from attnpred.predictor.layer_groups import LayerGroups
from attnpred.predictor.pretrained import Predictor, shipped
from attnpred.sharing import Sharing

FORECASTS = ("cnn", "cnn-unpadded")
"""Kinds of predictor that `predicted` runs as published."""


def make_settings(settings: CacheConfig | None, overrides: dict[str, Any]) -> CacheConfig:
    """Return `settings`, or the defaults, with single fields replaced."""
    known = {name: getattr(settings or CacheConfig(), name) for name in CacheConfig.__dataclass_fields__}
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ConfigError(f"got setting {unknown[0]!r}, expected one of {', '.join(known)}")
    return CacheConfig(**(known | overrides))


def described(policy: Policy[Any], settings: CacheConfig) -> str:
    """Return in a few words what a cache with these does, for a `repr`."""
    where = "in fast memory" if settings.offload is None else f"offload={settings.offload!r}"
    return f"{type(policy).__name__}, budget={settings.budget:.4g}, block_size={settings.block_size}, {where}"


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
    groups = LayerGroups.load(Path(settings.layer_groups))
    if groups.fingerprint != fingerprint(config):
        raise ConfigError(
            f"got {settings.layer_groups} of {groups.base_model} ({groups.fingerprint}) for {fingerprint(config)}, expected "
            "the same model: run attnpred analyse-layers on this one"
        )
    return Sharing(groups.leaders(), settings, evicts=policy.evicts and not settings.measure_recovery)


def attend_near(settings: CacheConfig, policy: Policy[Any]) -> CacheConfig:
    """Return `settings` in which a policy that selects always attends to what is near where layers share keys.

    Sinks and recent window become at least `own_sinks` and `own_recent`, in whole blocks, and count in the budget as ever.
    """
    if settings.layer_groups is None or policy.is_dense:
        return settings
    size = settings.block_size
    sinks = max(settings.num_sink_tokens, -(-settings.own_sinks // size) * size)
    recent = max(settings.recent_window, -(-settings.own_recent // size) * size)
    least = sinks + recent + 2 * size
    if isinstance(settings.budget, int) and settings.budget < least:
        raise ConfigError(
            f"got budget={settings.budget} with layer_groups and own_recent={settings.own_recent}, expected at least {least}: near "
            "tokens are always attended to; raise the budget or lower own_recent"
        )
    return replace(settings, num_sink_tokens=sinks, recent_window=recent)


def check_budgets(config: PreTrainedConfig, settings: CacheConfig) -> None:
    """Raise `ConfigError` if budgets of layers or heads are not as many as the model has."""
    text = config.get_text_config(decoder=True)
    heads = {getattr(one, "num_key_value_heads", None) or one.num_attention_heads for one in text.per_layer_config}
    for name, given, counts in (
        ("layer_budgets", settings.layer_budgets, {text.num_hidden_layers}),
        ("head_budgets", settings.head_budgets, heads),  # layers may differ in heads (Gemma4)
    ):
        if isinstance(given, tuple) and counts != {len(given)}:
            has = " or ".join(map(str, sorted(counts)))
            raise ConfigError(
                f"got {len(given)} {name} for a model of {has}, expected one for each: give {has} numbers"
            )


def make_policy(
    policy: str | Policy[Any], predictor: Predictor | str | Path | None, config: PreTrainedConfig, settings: CacheConfig
) -> Policy[Any]:
    """Return the policy of that name; one that learned gets the given predictor, or the shipped one that fits best."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"got policy {policy!r}, expected one of {', '.join(POLICIES)}")
    made: Any = POLICIES[policy]
    wanted: str = made.predictor_kind
    if not wanted and (predictor is None or made is not Predicted):
        return made.for_tokenizer(_tokenizer(config, policy)) if made.reads_tokens else made()
    chosen = _predictor(predictor, config, policy, wanted)
    chosen.require(settings.block_size or USUAL_BLOCK)
    kind = chosen.config.kind
    if kind == wanted:
        return made(chosen)
    if made is Predicted and kind in FORECASTS:
        return PaperForecast(chosen)
    wanted = wanted or FORECASTS[0]
    raise ConfigError(
        f"got a predictor of kind {kind!r} for policy {policy!r}, expected {wanted!r}: "
        f"make one (attnpred capture, attnpred train --predictor {wanted})"
    )


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


def _predictor(predictor: Predictor | str | Path | None, config: PreTrainedConfig, policy: str, kind: str) -> Predictor:
    """Return the given predictor, the shipped one of that name, or the shipped one that fits the model best."""
    if isinstance(predictor, Predictor):
        return predictor
    available = shipped()
    if predictor is not None:
        return Predictor.from_pretrained(available.get(str(predictor), predictor))
    candidates = [Predictor.from_pretrained(path) for path in available.values()]
    candidates = [candidate for candidate in candidates if candidate.config.kind == kind]
    for candidate in candidates:
        if candidate.config.fingerprint == fingerprint(config):
            return candidate
    raise ConfigError(
        f"got policy {policy!r} for {config.model_type} ({fingerprint(config)}), expected a {kind} predictor for it, and none is "
        f"shipped: make one (attnpred capture, attnpred train --predictor {kind}) and pass predictor="
    )
