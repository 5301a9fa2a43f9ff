"""`Predictor`: a network with the facts that say what it was trained for, and its way to and from disk and the Hub.

A saved predictor is a folder: `model.safetensors` (weights, fp32; of a gate fp16) and `config.json` (`PredictorConfig`).
The metadata of the weights hold a check value of both files: weights or settings that a disk changed would choose other
blocks without a word. Without one (not written here) a predictor is read as it is.
Nothing in it is executed when it is read. The authors' checkpoints are pickles; they are read by the restricted unpickler,
which builds tensors and refuses everything else.
"""

import ctypes
import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from attnpred.errors import PredictorError
from attnpred.files import make_folder, put, replacing, write_text
from attnpred.predictor.card import model_card
from attnpred.predictor.cnn import PaperCNN
from attnpred.predictor.predictor_config import CARD, CONFIG, HUB_ID, NETWORKS, WEIGHTS, PredictorConfig
from attnpred.predictor.seer_gate import SeerGate
from attnpred.reading import JSON_BYTES, read_text
from attnpred.shapes import expect

__all__ = ["NETWORKS", "SMALLEST_WIDTH", "Predictor", "PredictorConfig", "model_card", "shipped"]

SMALLEST_WIDTH = 3
"""Fewer blocks than this are not scored: all of them get a one, as published."""
LARGEST = 1e4
"""The largest weight: those that come with the package reach 38, and half precision ends at 65504."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHECK = "check"
"""The name of the check value in the metadata of the weights."""
SHOWN = 8
"""Faults of a file that are named."""


class Predictor(nn.Module):
    """Scores the blocks that the next token will attend from the rows of the last tokens. Weights keep their precision."""

    def __init__(self, config: PredictorConfig | None = None) -> None:
        super().__init__()
        self.config = config or PredictorConfig()
        with torch.random.fork_rng(devices=[]):  # weights that are loaded in a moment take no number from the caller
            self.network = NETWORKS[self.config.kind](self.config)

    def forward(self, rows: Tensor) -> Tensor:
        """Return fp32 scores [B, Hs, C] for `rows` [B, Hs, H, C], oldest row first; any float dtype goes in."""
        expect("rows", rows, -1, -1, -1, -1)
        batch, heads, history, width = rows.shape
        if width < SMALLEST_WIDTH:
            return rows.new_ones((batch, heads, width), dtype=torch.float32)
        scores: Tensor = self.network(rows.reshape(batch * heads, history, width).float())
        return scores.view(batch, heads, width)

    @property
    def gate(self) -> SeerGate:
        """The network of a predictor that is a gate."""
        assert isinstance(self.network, SeerGate)
        return self.network

    @property
    def cnn(self) -> PaperCNN:
        """The network of a predictor that looks at rows."""
        assert isinstance(self.network, PaperCNN)
        return self.network

    def place(self, layer: int) -> int:
        """Return where the weights of the model's layer `layer` are; raise `PredictorError` if there are none."""
        layers = self.config.layer_ids
        if layers and layer not in layers:
            raise PredictorError(f"got no weights for layer {layer}, expected layers {layers}: train it for this model")
        return layers.index(layer) if layers else 0

    def require(self, block_size: int) -> None:
        """Raise `PredictorError` unless this predictor was trained for blocks of `block_size` tokens."""
        if self.config.block_size != block_size:
            raise PredictorError(
                f"got a predictor for blocks of {self.config.block_size}, expected {block_size}: "
                f"set block_size={self.config.block_size}, or train one with `attnpred capture` and `attnpred train`"
            )

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the weights and the config into `directory` (made if missing), each file all or nothing; return it.

        Raises `OutputError`.
        """
        folder = Path(directory)
        make_folder(folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        data = save(tensors, {CHECK: check_value(self.config, tensors)})
        # Both are on their way before either takes its name: a full disk leaves what was there.
        with replacing(folder / CONFIG) as config, replacing(folder / WEIGHTS) as weights:
            put(weights, data)
            put(config, self.config.to_json().encode())
        return folder

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, revision: str | None = None) -> "Predictor":
        """Return the predictor in a local directory or in a Hub repository `owner/name` (at `revision`)."""
        folder = Path(path_or_hub_id).expanduser()
        if folder.is_dir():
            files = {name: folder / name for name in (CONFIG, WEIGHTS)}
        elif isinstance(path_or_hub_id, str) and HUB_ID.fullmatch(path_or_hub_id) and not folder.exists():
            files = {name: _download(path_or_hub_id, name, revision) for name in (CONFIG, WEIGHTS)}
        else:
            got = "file" if folder.exists() else "missing directory"
            raise PredictorError(
                f"got {got} {str(folder)!r}, expected a directory with {CONFIG} and {WEIGHTS}, or a Hub id"
            )
        for name, path in files.items():
            if not path.is_file():
                raise PredictorError(
                    f"got no {name} in {str(folder)!r}, expected {CONFIG} and {WEIGHTS}: save it again"
                )
        text = read_text(files[CONFIG], "a config: save it again", JSON_BYTES, PredictorError)
        config = PredictorConfig.from_json(text, str(files[CONFIG]))
        try:
            with safe_open(files[WEIGHTS], "pt") as file:
                tensors, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise PredictorError(
                f"got a damaged {files[WEIGHTS]} ({error}), expected a safetensors file: copy or train it again"
            ) from None
        _check_size(config, tensors, str(files[WEIGHTS]))
        predictor = cls(config)
        predictor._fill(tensors, str(files[WEIGHTS]))
        if CHECK in said and said[CHECK] != check_value(config, tensors):
            raise PredictorError(
                f"got {str(folder)!r} whose {CONFIG} or {WEIGHTS} was changed after they were saved, expected both as they "
                "were: copy or train it again"
            )
        return predictor

    @classmethod
    def from_reference_checkpoint(cls, path: str | Path, config: PredictorConfig | None = None) -> "Predictor":
        """Return the predictor in a `.pth` file of the AttentionPredictor authors; no code in the file is run."""
        if not Path(path).is_file():
            raise PredictorError(f"got no file {str(path)!r}, expected a .pth checkpoint: correct the path")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old pickle formats; they are read or refused all the same
                loaded = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged or hostile pickle can raise anything, and torch's text advises to run it
            raise PredictorError(
                f"got {str(path)!r} that is not plain tensors ({type(error).__name__}), expected a state dict: do not trust it"
            ) from None
        for key in ("state_dict", "model_state_dict"):
            if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                loaded = loaded[key]
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
        ):
            raise PredictorError(f"got {str(path)!r} with something else than named tensors, expected a state dict")
        predictor = cls(config)
        predictor._fill(loaded, str(path))
        return predictor

    def push_to_hub(self, repo_id: str, private: bool = False, card: str | None = None) -> str:
        """Upload the predictor and a model card (`card`, or a short one) to the Hub; return the address."""
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_text(Path(folder, CARD), card if card is not None else model_card(self.config))
            try:
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload predictor")
            except Exception as error:  # the client's errors share no base class
                raise PredictorError(
                    f"got no upload to {repo_id!r} ({_line(error)}), expected a Hub repository of yours: log in"
                ) from error
        return str(url)

    def _fill(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy `tensors` into the network, or say which are missing, unexpected, of another shape or not numbers."""
        wanted = self.network.state_dict()
        wrong = [f"missing {name}" for name in wanted if name not in tensors]
        wrong += [f"unexpected {name[:60]}" for name in tensors if name not in wanted]
        for name in set(wanted) & set(tensors):
            tensor = tensors[name]
            if tensor.shape != wanted[name].shape:
                wrong.append(f"{name} of shape {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}")
            elif tensor.dtype not in FLOATS or not bool(tensor.isfinite().all()):
                wrong.append(f"{name} with values that are not finite floats")
            elif (most := float(tensor.abs().max())) > LARGEST:
                wrong.append(f"{name} with values up to {most:.3g}, beyond {LARGEST:g}")
        if wrong:
            more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            expected = f"the {len(wanted)} tensors of kind {self.config.kind!r}"
            raise PredictorError(
                f"got {source} with {', '.join(wrong[:SHOWN])}{more}, expected {expected}: train it again"
            )
        self.network.load_state_dict(tensors)


def check_value(config: PredictorConfig, tensors: dict[str, Tensor]) -> str:
    """Return the check value of a predictor: of what its config says, and of its weights, contiguous in host memory."""
    fields = dataclasses.fields(config)
    said = {field.name: getattr(config, field.name) for field in fields if getattr(config, field.name) != field.default}
    found = hashlib.sha256(
        json.dumps(said, sort_keys=True).encode()
    )  # a field that a later version adds changes nothing
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        found.update(_bytes(tensors[name]))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    assert tensor.is_cpu and tensor.is_contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def _check_size(config: PredictorConfig, tensors: dict[str, Tensor], source: str) -> None:
    """Raise `PredictorError` unless there are as many numbers as the config claims: before memory is taken for them."""
    claimed = max(1, len(config.layer_ids)) * config.heads
    if config.kind == "seer-gate":
        claimed *= config.group * config.head_dim * config.rank
    held = sum(tensor.numel() for tensor in tensors.values())
    if held < claimed:
        raise PredictorError(
            f"got {source} with {held:,} numbers, expected at least the {claimed:,} of its config: train it again"
        )


def shipped() -> dict[str, Path]:
    """Return the predictors that come with the package: name -> directory for `from_pretrained`."""
    folder = Path(__file__).parent.parent / "assets" / "predictors"
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}


def _download(repo_id: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(os.fspath(hf_hub_download(repo_id, name, revision=revision)))
    except Exception as error:  # the client's errors share no base class
        raise PredictorError(
            f"got no {name} from {repo_id!r} ({_line(error)}), expected a local directory or a Hub id that can be reached"
        ) from error


def _line(error: Exception) -> str:
    """Return the first line of an error, and its type: a user's mistake is told in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
