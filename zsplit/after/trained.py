"""The model that a run trained: the uncut model of its config with the newest weights."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zsplit.config import Config
from zsplit.config.datasets import is_function
from zsplit.data import sample_shape
from zsplit.errors import ConfigError, StorageError
from zsplit.model import zoo
from zsplit.results import RunFolder
from zsplit.wire.manifest import LOCAL, OPTIMIZER


class Trained(NamedTuple):
    """A run's model in evaluation mode, on a device, the shape of its samples, and the file its weights are from."""

    model: nn.Module
    config: Config
    shape: tuple[int, ...]
    file: Path
    device: torch.device


def load_trained(run: RunFolder, device: torch.device, allowed: Collection[str] = ()) -> Trained:
    """Return the run's model; a function that makes it has to be in one of the `allowed` modules (`zsplit.own`).

    Raises ConfigError where it has no version, or its model cannot be built by name, StorageError where the weights
    cannot be read or are another model's.
    """
    config = run.config()
    file = run.weights()
    shape = sample_shape(config)
    try:
        model = zoo.build(config.model.name, config.model.num_classes, config.run.seed, shape, allowed)
    except ConfigError as error:
        if is_function(config.model.name):
            raise
        reason = str(error).removesuffix(".")
        raise ConfigError(
            f"The run's model cannot be built here ({reason}): where a Python script handed it over, let that script "
            f"load {file} with safetensors."
        ) from error
    _load(model, read_weights(file), file)
    return Trained(model.to(device).eval(), config, shape, file, device)


def version_of(file: Path) -> str:
    """Return the digest of the version that a run's file of weights is; empty for other files. Raises StorageError."""
    try:
        with safe_open(file, framework="pt") as opened:
            about: dict[str, str] = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error
    return about.get("version", file.stem if "manifest" in about else "")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the model's tensors in a safetensors file, without optimizer buffers. Raises StorageError."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if not name.startswith((OPTIMIZER, LOCAL))]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> StorageError:
    return StorageError(f"{file} cannot be read ({error}): put it back from a copy, or run again.")


def _load(model: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    state: dict[str, Any] = model.state_dict()
    odd = sorted(state.keys() ^ weights.keys())
    odd += [name for name in sorted(state.keys() & weights.keys()) if state[name].shape != weights[name].shape]
    if odd:
        raise StorageError(
            f"{file} is not of the model that the run's config names, they differ in {odd[0]!r}: put the run's own "
            "files back."
        )
    model.load_state_dict(weights)
