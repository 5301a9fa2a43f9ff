"""lm-evaluation-harness (extra `eval`) on a model with a policy and a budget: `--model attnpred` on its command line.

    attnpred lm-eval --model attnpred --model_args pretrained=MODEL,policy=quest,budget=1024 --tasks ...

The harness has a registry of models, but no entry points by which a package could add to it before its command line
runs. So this module adds its line when it is imported, and `main` then runs the harness's own command line.

`AttnpredLM` is the harness's own model class, attached. What is generated goes through `generate`, as always. A request for
a log-likelihood would be one dense pass over context and continuation, which no policy has a part in; here the context
but for its last token is read in one pass, and the others are decode steps. Both ways of the class above take only models
that are given by name; to pass a loaded model, attach it and give it to `HFLM(pretrained=model)`, which then generates
with the policy, and has its log-likelihoods from the dense path.
"""

import dataclasses
import sys
from typing import Any, final

import torch

from attnpred import hf
from attnpred.config import CacheConfig
from attnpred.errors import AttnpredError, ConfigError, missing_extra
from attnpred.evaluation.variants import parse_variant
from attnpred.hf.load import load_config
from attnpred.telemetry import LayerCounts, total

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    raise missing_extra(error.name or "lm_eval", "eval") from None

SETTINGS = {field.name for field in dataclasses.fields(CacheConfig)}


@final
@register_model("attnpred")
class AttnpredLM(HFLM):
    """policy: a word as for `attnpred eval` (`quest`, `ema:rate=0.1`); budget: tokens, or a share of the context up to 1.

    pretrained: as MODEL of every command; predictor: a folder or Hub id. Others are settings of `CacheConfig`, and
    all that the harness's `hf` takes. Raises `ConfigError` and `UnsupportedModelError` before the first request.
    """

    def __init__(
        self,
        pretrained: str = "demo",
        *,
        policy: str = "predicted",
        budget: int | float = 1024,
        predictor: str | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(pretrained, str):
            raise ConfigError(
                f"got a loaded {type(pretrained).__name__}, expected a name: attach it and give it to HFLM(pretrained=model)"
            )
        settings = CacheConfig(budget=budget, **{name: others.pop(name) for name in SETTINGS & others.keys()})
        variant = parse_variant(policy)
        if predictor is not None:
            variant = dataclasses.replace(variant, predictor=predictor)
        if others.get("dtype", "auto") == "auto":
            others["dtype"] = load_config(pretrained, device=others.get("device"))[1].dtype
        super().__init__(hf.source_of(pretrained), **others)
        made, settings = variant.make(self.model.config, settings)
        self._settings, self._label = settings, variant.label
        self._followed: list[LayerCounts] = []
        self.attached = hf.attach(self.model, policy=made, config=settings)

    def detach(self) -> None:
        """Give the model back as it was; what is asked then is answered by the dense path."""
        self.attached.detach()

    def stats(self) -> dict[str, Any]:
        """Return the counters of what was generated, and of the decode steps for log-likelihoods, over all layers."""
        return {"generated": self.attached.stats()["total"], "followed": total(self._followed).as_dict()}

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results: its own facts, and the policy, the budget and the counters."""
        said = {"policy": self._label, "settings": dataclasses.asdict(self._settings), "stats": self.stats()}
        return super().get_model_info() | {"attnpred": said}

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is the greedy answer) of each continuation, one after the other."""
        found = []
        past: tuple[list[int], hf.TieredCache] | None = None
        for names, context, continuation in tqdm(requests, "log-likelihoods", disable=disable_tqdm):
            given = (context + continuation)[-(self.max_length + 1) :]  # as the class above cuts it
            context = given[: len(given) - len(continuation)]
            if past is None or past[0] != context[:-1]:  # the choices of a question follow each other
                past = context[:-1], self._read(context[:-1])
            answer = self._follow(past[1].fork(), context[-1:], continuation)
            found.append(answer)
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, answer)
        return found

    def _read(self, tokens: list[int]) -> hf.TieredCache:
        cache = self.attached.new_cache()
        if tokens:
            self._next(cache, tokens)
        return cache

    def _follow(self, cache: hf.TieredCache, last: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Feed one token after the other, the last of the context first."""
        likelihood, is_greedy = 0.0, True
        for token, target in zip([*last, *continuation], continuation, strict=False):
            row = torch.log_softmax(self._next(cache, [token]).float(), -1)
            likelihood += float(row[target])
            is_greedy &= int(row.argmax()) == target
        self._followed.append(total(list(cache.counts.values())))
        return likelihood, is_greedy

    def _next(self, cache: hf.TieredCache, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.device, dtype=torch.int64)
        logits: torch.Tensor = self.model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1]


def main() -> int:
    """Run the harness's own command line, which now knows the model; return the exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except AttnpredError as error:
        print("attnpred:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
