"""`Header`: what a saved cache says of itself, and whether a model, settings, a policy and a predictor fit it.

It is the metadata of the file, one text of JSON for each field, readable with any safetensors library. Everything that the
keys and values depend on is in it: another model, other weights or adapters (`attnpred.hf.weights`), another kind of number
or another predictor is refused, because the tokens would be wrong without a word. The name of the model is for people.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from attnpred.checks import shown
from attnpred.config import CacheConfig
from attnpred.errors import CacheFileError, ConfigError
from attnpred.hf.choose import fingerprint, make_policy, make_settings
from attnpred.hf.header_types import FITS
from attnpred.hf.modes import attending_dtype
from attnpred.hf.weights import alike, answers, hash_samples
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.predictor.pretrained import Predictor, shipped
from attnpred.reading import parse_json

FORMAT = "2"
_MARK, _SUM = "attnpred_cache", "sum"  # beside the fields: version of the format, and a hash of all the others
LOCAL = ("offload_dir", "fast_limit", "host_limit", "disk_limit")
"""Settings that say something of a machine; they are not saved."""
FREE = (*LOCAL, "offload", "fetch_timeout", "late_share", "measure_recovery", "strict")
"""Settings that may change from save to load: nothing that is remembered depends on them."""
_NAMES: dict[type, str] = {kind: name for name, kind in POLICIES.items()} | {PaperForecast: "predicted"}
_NO_ARCHITECTURE = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}


@final
@dataclass(frozen=True, slots=True)
class Header:
    """config, predictor, tokens: SHA-256 of the model's config, the predictor's weights, the token ids.

    weights, answers: marks of the model's weights (`attnpred.hf.weights`).
    layers: what there is to say of each layer beside its tensors; decoders: the plain numbers of each layer's decoder;
    sums: check values of the tensors that are read at once.
    """

    attnpred: str
    model: str
    revision: str | None
    fingerprint: str
    config: str
    rope: Any
    weights: str
    answers: list[list[float]]
    dtype: str
    block_size: int
    settings: dict[str, Any]
    policy: str
    policy_settings: dict[str, Any]
    predictor: str | None
    length: int
    batch: int
    tokens: str | None
    layers: list[dict[str, Any]]
    decoders: dict[str, dict[str, Any]]
    sums: dict[str, int]

    @classmethod
    def of(cls, config: PreTrainedConfig, settings: CacheConfig, policy: Policy[Any], **found: Any) -> "Header":
        """Return the header of a cache for a model of `config`; found: the fields about its content."""
        name, hyper, predictor = described(policy)
        return cls(
            attnpred=version("attnpred"),
            **_identity(config),
            rope=getattr(config.get_text_config(decoder=True), "rope_parameters", None),
            block_size=settings.block_size,
            settings={key: value for key, value in asdict(settings).items() if key not in LOCAL},
            policy=name,
            policy_settings=hyper,
            predictor=predictor,
            **found,
        )

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of the file."""
        texts = {_MARK: FORMAT} | {field.name: _json(getattr(self, field.name)) for field in fields(self)}
        return texts | {_SUM: _sha256(_json(texts).encode())}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> "Header":
        """Return the header in the metadata of the file `path`. Raises `CacheFileError`."""
        if _MARK not in metadata:
            raise CacheFileError(f"got {path}, which is no saved cache, expected one of `cache.save`: check the name")
        if metadata[_MARK] != FORMAT:
            raise CacheFileError(
                f"got {path} in format {metadata[_MARK]}, expected {FORMAT}: update attnpred, or save the cache again"
            )
        texts = {name: text for name, text in metadata.items() if name != _SUM}
        names = {field.name for field in fields(cls)}
        if metadata.get(_SUM) != _sha256(_json(texts).encode()) or set(texts) != names | {_MARK}:
            raise CacheFileError(f"got a damaged header in {path}, expected it as it was saved: save the cache again")
        expected = "a header as it was saved"
        found = {name: parse_json(texts[name], f"{name} of {path}", expected, CacheFileError) for name in names}
        if wrong := sorted(name for name in names if not FITS[name](found[name])):
            raise CacheFileError(
                f"got {shown(found[wrong[0]])} for {wrong[0]} in {path}, expected {expected}: save it again"
            )
        return cls(**found)

    def require(self, config: PreTrainedConfig, dtype: torch.dtype, path: Path) -> None:
        """Raise `CacheFileError` unless a model of that config and kind of numbers could have made it."""
        own = _identity(config)
        if own["config"] != self.config:
            raise CacheFileError(
                f"got {path}, saved with {self.model or 'a model'} ({self.fingerprint}), for {own['model'] or 'a model'} "
                f"({own['fingerprint']}), expected the same config: load the model that the cache was saved with"
            )
        if name_of(dtype) != self.dtype:
            raise CacheFileError(
                f"got {path}, saved in {self.dtype}, for a model in {name_of(dtype)}, expected the same: load the model "
                f"with dtype={self.dtype}"
            )

    def require_weights(self, model: PreTrainedModel, path: Path) -> None:
        """Raise `CacheFileError` unless the weights of `model`, which passed `require`, would give the same keys."""
        if hash_samples(model) != self.weights or not alike(self.answers, answers(model), model.dtype):
            raise CacheFileError(
                f"got {path}, saved with other weights of {self.model or 'this model'}, expected the same, with the same "
                f"adapters at work: load the model as it was when the cache was saved, or read the text again"
            )

    def settings_with(self, overrides: Mapping[str, Any]) -> CacheConfig:
        """Return the settings of the saved cache, with those changed that may. Raises `ConfigError`."""
        if fixed := sorted(set(overrides) - set(FREE)):
            raise ConfigError(
                f"got setting {fixed[0]!r}, expected one of {', '.join(sorted(FREE))}: a saved cache depends on the others"
            )
        return make_settings(None, self.settings | dict(overrides))

    def find_policy(
        self,
        policy: Policy[Any] | None,
        predictor: Predictor | str | Path | None,
        config: PreTrainedConfig,
        settings: CacheConfig,
        path: Path,
    ) -> Policy[Any]:
        """Return the policy of the saved cache: the one given, or a known one with its predictor, given or shipped."""
        if policy is None and self.policy not in POLICIES:
            raise CacheFileError(
                f"got {path} of policy {self.policy}, expected one that comes with attnpred: pass policy=, an equal one"
            )
        if policy is None and self.predictor is None:
            try:
                policy = POLICIES[self.policy](**self.policy_settings)
            except TypeError as error:  # other fields, or types, than the policy has
                raise CacheFileError(
                    f"got policy {self.policy} with {error} in {path}, expected it as it was saved"
                ) from error
        if policy is None:
            known = shipped().values() if predictor is None else ()
            candidates = (Predictor.from_pretrained(place) for place in known)
            found = predictor or next((one for one in candidates if weights_hash(one) == self.predictor), None)
            if found is None:
                raise CacheFileError(
                    f"got {path} of a predictor that does not come with attnpred, expected it: pass predictor="
                )
            policy = make_policy(self.policy, found, config, settings)
        if described(policy) != (self.policy, self.policy_settings, self.predictor):
            raise CacheFileError(
                f"got a policy or predictor other than {path} was saved with, expected {self.policy} "
                f"{self.policy_settings or ''}: pass the same one"
            )
        return policy


def described(policy: Policy[Any]) -> tuple[str, dict[str, Any], str | None]:
    """Return name, hyper-parameters and the hash of the predictor of a policy."""
    names: list[str] = [field.name for field in fields(policy)] if is_dataclass(policy) else []
    values = {name: getattr(policy, name) for name in names}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}  # as in JSON
    predictor = values.pop("predictor", None)
    hyper = json.loads(_json(values))  # as they will be read
    return (
        _NAMES.get(type(policy), type(policy).__name__),
        hyper,
        None if predictor is None else weights_hash(predictor),
    )


def weights_hash(predictor: Predictor) -> str:
    """Return the SHA-256 of a predictor's kind and weights."""
    digest = hashlib.sha256(predictor.config.kind.encode())
    for name, tensor in sorted(predictor.network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def name_of(dtype: torch.dtype) -> str:
    """Return "float32" and the like."""
    return str(dtype).removeprefix("torch.")


def made_by(model: PreTrainedModel) -> dict[str, Any]:
    """Return what keys and values depend on beside the tokens, as far as a header tells it."""
    dtype = name_of(attending_dtype(model.device, model.dtype))
    return _identity(model.config) | {"dtype": dtype, "weights": hash_samples(model)}


def _identity(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that say which model it is."""
    text = config.get_text_config(decoder=True)
    # What every config has is not about the architecture; what is None or False may be new in some version.
    general = set(PreTrainedConfig().to_dict()) - {"model_type"} | _NO_ARCHITECTURE
    numbers = {
        name: value
        for name, value in text.to_dict().items()
        if name not in general and not name.startswith("_") and value is not None and value is not False
    }
    return {
        "model": str(getattr(text, "_name_or_path", "") or ""),
        "revision": getattr(text, "_commit_hash", None),
        "fingerprint": fingerprint(config),
        "config": _sha256(_json(numbers).encode()),
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
