"""The state of a training run on disk: log, best weights and the checkpoint to resume from. See `training.py`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from attnpred.errors import PredictorError
from attnpred.files import write_bytes, write_text
from attnpred.predictor.predictor_config import WEIGHTS
from attnpred.predictor.pretrained import Predictor
from attnpred.predictor.windows import Window
from attnpred.reading import JSON_BYTES, parse_json, read_text, require_regular

CHECKPOINT, LOG = "checkpoint.safetensors", "train_log.jsonl"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_LOSS_SCALE = 4096.0


class TrainingRun:
    """Weights, moments of Adam, step, best step and log; `record` saves all of it, `resume` takes it up again.

    settings: all that decides the result but the number of steps, for a finished run may be made longer.
    """

    def __init__(self, folder: Path, predictor: Predictor, lr: float, settings: dict[str, Any]) -> None:
        self.folder, self.predictor, self.settings = folder, predictor, settings
        self.step, self.best_step, self.best = 0, 0, -1.0
        self.log: list[dict[str, Any]] = []
        self.device = next(predictor.parameters()).device
        self.lr = lr
        self.optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)

    def learn(self, step: int, windows: list[Window]) -> float:
        """Take step number `step` on windows of several queries; return the loss.

        The learning rate falls as 1 / (1 + step / 200), which does not ask how many steps there will be. The loss is
        multiplied by a constant before it is differentiated: attention of old blocks is about 0.001, and gradients of
        its square would be as small as what Adam adds to its denominators.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr / (1 + step / 200)
        self.optimizer.zero_grad()
        total = 0.0
        for window in windows:
            scores = self.predictor.network(window.rows.to(self.device))
            loss = torch.nn.functional.mse_loss(scores, window.target.to(self.device))
            (loss * (_LOSS_SCALE / len(windows))).backward()
            total += float(loss.detach()) / len(windows)
        self.optimizer.step()
        return total

    def record(self, step: int, loss: float, recovery: dict[str, float], seconds: float) -> None:
        """Log one measurement and save. The checkpoint goes last: what is newer than it will be done again alike."""
        if not loss < float("inf"):
            raise PredictorError(f"got a loss of {loss} at step {step}, expected a number: lower lr")
        self.step = step
        self.log.append({"step": step, "train_loss": loss, "recovery": recovery, "seconds": round(seconds, 3)})
        write_text(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in self.log))
        if recovery["cnn"] > self.best:
            self.best, self.best_step = recovery["cnn"], step
            self.predictor.save_pretrained(self.folder)
        facts = {"step": self.step, "best_step": self.best_step, "best": self.best, "settings": self.settings}
        write_bytes(self.folder / CHECKPOINT, save(dict(self._tensors()), metadata={"run": json.dumps(facts)}))

    def resume(self) -> None:
        """Take over the checkpoint in the folder, if there is one, unless it is of other settings."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        require_regular(path, "a run to resume: delete it to begin again", PredictorError)
        try:
            with safe_open(path, framework="pt") as file:
                facts = parse_json(file.metadata()["run"], path, "a run to resume")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            for name, expected in self.settings.items():
                if (got := facts["settings"].get(name)) != expected:
                    raise PredictorError(
                        f"got {path} of a run with {name}={got!r}, expected {expected!r}: use another --out, or delete it"
                    )
            self.step, self.best_step, self.best = facts["step"], facts["best_step"], facts["best"]
            text = read_text(self.folder / LOG, "a run to resume", JSON_BYTES)
            lines = [parse_json(line, LOG, "a run to resume") for line in text.split("\n") if line]
            self.log = [line for line in lines if line["step"] <= self.step]
            if not any(line["step"] == self.best_step for line in self.log):
                raise LookupError(f"no line for step {self.best_step}")
            if not (self.folder / WEIGHTS).is_file():
                raise LookupError(f"no {WEIGHTS}")
            self._restore(tensors)
        except (SafetensorError, OSError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise PredictorError(
                f"got a damaged {path} or {LOG} ({error}), expected a run to resume: delete both to begin again"
            ) from None

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.predictor.network.named_parameters():
            state = self.optimizer.state[parameter]
            for key, tensor in {"weight": parameter, **{key: state[key] for key in _MOMENTS}}.items():
                yield f"{key}/{name}", tensor.detach().cpu().contiguous()

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.predictor.network.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"weight/{name}"])
            moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in _MOMENTS}
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), dtype=torch.float32, device="cpu"),
                **moments,
            }
