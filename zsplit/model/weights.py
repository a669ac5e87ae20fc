"""A warm start: the weights that version 0 begins with, read from a file and checked against the model."""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zsplit.errors import ConfigError
from zsplit.model.tracer import first_line

SHOWN = 3
"""Names of a kind that a refusal lists."""


def read_weights(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict in a file, in the order and with the dtypes of `like`, which is the model's own.

    The file is safetensors, or torch's (`.pt`, `.pth`), of which nothing but tensors is loaded. BatchNorm's counters of
    batches, which older files lack (torchvision's among them), begin as the model's. Raises ConfigError where the file
    cannot be read, and where names or shapes are not the model's.
    """
    found = {name: own for name, own in like.items() if name.endswith("num_batches_tracked")} | _read(path)
    if refusal := _refusal(found, like):
        raise ConfigError(
            f"model.weights = {path} does not fit the model: {refusal}; name the weights of this very model, "
            "its number of classes included."
        )
    return {name: found[name].to(own.dtype) for name, own in like.items()}


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ConfigError(f"model.weights = {path} is neither .safetensors nor .pt nor .pth: save it as one of these.")
    if not path.is_file():
        raise ConfigError(f"model.weights = {path} is no file on the server: put it there, or mend the path.")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"model.weights = {path} is damaged or holds more than tensors: save the model's state_dict() alone."
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise ConfigError(f"model.weights = {path} cannot be read ({first_line(error)}): save it again.") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"model.weights = {path} is no state_dict of tensors: save the model's state_dict() alone.")
    return found


def _load_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _refusal(found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> str:
    """Return what does not fit, or nothing."""
    shapes = [
        f"{name} is {_shape(found[name])}, not {_shape(own)}"
        for name, own in like.items()
        if name in found and found[name].shape != own.shape
    ]
    lists = {
        "it lacks ": [name for name in like if name not in found],
        "it has also ": [name for name in found if name not in like],
        "": shapes,
    }
    return "; ".join(word + _few(names) for word, names in lists.items() if names)


def _few(names: Iterable[str]) -> str:
    first, rest = list(names)[:SHOWN], list(names)[SHOWN:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"
