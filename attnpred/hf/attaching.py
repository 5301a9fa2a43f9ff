"""`attach`: from names and settings to a model with the sparse path switched on. What cannot be served is refused here."""

import logging
import weakref
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError, NotSparseError
from attnpred.hf.cache import TieredCache
from attnpred.hf.choose import attend_near, check_budgets, described, make_policy, make_settings, make_sharing
from attnpred.hf.handle import Attached
from attnpred.hf.originals import check_place
from attnpred.hf.packing import pack_weights
from attnpred.hf.support import is_served, refuse_model, refuse_unsupported
from attnpred.policies.base import Policy
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.policies.pod import Pod
from attnpred.predictor.pretrained import Predictor

logger = logging.getLogger("attnpred")


def attach(
    model: PreTrainedModel,
    budget: int | float | None = None,
    *,
    policy: str | Policy[Any] = "predicted",
    config: CacheConfig | None = None,
    predictor: Predictor | str | Path | None = None,
    weights: str | None = None,
    originals: str | None = None,
    **overrides: Any,
) -> Attached:
    """Switch the sparse path of `model` on, for good or for a `with` block, and return the handle.

    budget: tokens, or a share of the context up to 1 (see `CacheConfig`); config and overrides: all other settings;
    policy: a name of `attnpred info`, or an instance; predictor: a `Predictor`, a folder or a Hub id;
    weights: "int8" or "int4" packs those of linear layers meanwhile, on a CPU; "float" leaves them, and multiplies by our
    own kernels (`attnpred.hf.packing`);
    originals: "disk" has the weights that were packed in a file meanwhile, not in memory (`attnpred.hf.originals`).
    Raises `UnsupportedModelError` and `ConfigError` before the first token.

    Example:
        with attnpred.attach(model, budget=1024) as attached:
            model.generate(**inputs)
            attached.stats()["total"]["tokens_attended"]
    """
    if "generate" in vars(model):
        raise ConfigError(
            f"got a {type(model).__name__} that is attached already, expected a free one: call detach() on the earlier handle"
        )
    refuse_unsupported(model.config)
    refuse_model(model)
    if budget is not None:
        overrides["budget"] = budget
    settings = make_settings(config, overrides)
    check_budgets(model.config, settings)
    chosen = make_policy(policy, predictor, model.config, settings)
    settings = attend_near(chosen.settle(settings), chosen)
    if make_sharing(model.config, settings, chosen) is None and isinstance(chosen, Pod):
        logger.warning("got policy 'pod' without layer_groups: no keys are shared, and every step is dense")
    if isinstance(chosen, PaperForecast):
        chosen.predictor.to(model.device)
    if not any(is_served(layer) for layer in DynamicCache(config=model.config).layers):
        why = f"{model.config.model_type} has no full-attention layer: there is nothing to compress"
        if settings.strict:
            raise NotSparseError(f"got strict=True, but {why}")
        logger.warning(why)

    def make_cache() -> TieredCache:
        cache = TieredCache(model.config, policy=chosen, config=settings)
        cache.model = weakref.ref(model)
        return cache

    check_place(originals, weights)
    packing = None if weights is None else pack_weights(model, weights, originals)
    try:
        what = described(chosen, settings)
        return Attached(model, make_cache, what, strict=settings.strict, packing=packing).activate()
    except BaseException:
        if packing is not None:
            packing.undo()
        raise
