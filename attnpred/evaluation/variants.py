"""A policy with settings of its own, as one word: `ema:rate=0.1`, `predicted:late_share=0,predictor=demo`.

After the name come fields of the policy, fields of `CacheConfig`, or `predictor`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from attnpred import checks, hf
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy
from attnpred.reading import parse_json


@dataclass(frozen=True, slots=True)
class Variant:
    """`label` is the whole word; `fields` of the policy, `settings` of the cache."""

    label: str
    name: str
    fields: dict[str, Any]
    settings: dict[str, Any]
    predictor: str | None

    def make(self, model_config: Any, settings: CacheConfig) -> tuple[Policy[Any], CacheConfig]:
        """Return the policy, and `settings` with this variant's own."""
        own = dataclasses.replace(settings, **self.settings)
        policy: Any = hf.make_policy(self.name, self.predictor, model_config, own)
        try:
            made: Policy[Any] = dataclasses.replace(policy, **self.fields) if self.fields else policy
            return made, made.settle(own)
        except TypeError:  # a word where a number belongs
            raise ConfigError(f"got policy {self.label!r}, expected numbers for {', '.join(self.fields)}") from None


def parse_variant(word: str) -> Variant:
    """Return the variant that `word` names."""
    name, _, rest = word.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"got policy {name!r}, expected one of {', '.join(POLICIES)}")
    fields: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    predictor = None
    known = {field.name for field in dataclasses.fields(POLICIES[name])} - {"predictor"}  # type: ignore[arg-type]
    for part in rest.split(",") if rest else []:
        key, equals, text = part.partition("=")
        value = _value(text)
        if equals and key == "predictor":
            predictor = text
        elif equals and key in known:
            fields[key] = value if type(value) is not int else checks.whole(key, value, -checks.WHOLE)
        elif equals and key in CacheConfig.__dataclass_fields__:
            settings[key] = value
        else:
            raise ConfigError(
                f"got {part!r} in policy {word!r}, expected setting=value with one of "
                f"{', '.join(sorted(known | set(CacheConfig.__dataclass_fields__)))} or predictor"
            )
    return Variant(word, name, fields, settings, predictor)


def _value(text: str) -> Any:
    try:
        return parse_json(text, "", "")
    except ConfigError:  # no JSON: a word
        return None if text == "none" else text
