"""Writing a run's model for others: the suffix of the file says how."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from zsplit.after.graphs import write_onnx, write_program, write_torchscript
from zsplit.after.trained import Trained
from zsplit.errors import ConfigError, StorageError
from zsplit.model import trace

CODEC_COSTS = 0.01
"""Accuracies with and without the codec that differ by more than this are worth a warning."""


class Request(NamedTuple):
    """What is to be written: the model on the CPU, and where it is cut (empty: nowhere known)."""

    trained: Trained
    cut: str


Writer = Callable[[Request, Path], list[Path]]
"""Writes a model at a path; returns the files that it made."""


def export(trained: Trained, target: Path, cut: str = "", force: bool = False) -> list[Path]:
    """Write the model, as the target's suffix says; return the files. They appear whole or not at all.

    `cut` is needed for `.front+back` alone. Raises ConfigError for an unknown suffix, a file that exists already
    (unless `force`), missing packages and a model that the format cannot hold, PlanError for a cut that does not
    exist, StorageError where nothing can be written.
    """
    writer = FORMATS[known_suffix(target)]
    request = Request(trained._replace(model=trained.model.cpu(), device=torch.device("cpu")), cut)
    try:
        with TemporaryDirectory(dir=target.parent, prefix=".zsplit-") as draft:
            written = writer(request, Path(draft) / target.name)
            for file in written:
                _refuse_existing(target.parent / file.name, force)
            return [file.rename(target.parent / file.name) for file in written]
    except OSError as error:
        raise StorageError(f"{target} cannot be written ({error.strerror}): choose another --to.") from error


def target_of(text: str, name: str) -> Path:
    """Return the path that `--to` means: a file, or a bare format such as `onnx`, which is a file of this name here."""
    return Path(f"{name}.{text}" if f".{text}" in FORMATS else text).expanduser()


def known_suffix(target: Path) -> str:
    """Return the target's suffix. Raises ConfigError where no format has it."""
    if target.suffix not in FORMATS:
        raise ConfigError(f"{target} does not say what to write: end it in {', '.join(FORMATS)}.")
    return target.suffix


def cut_of(summary: Mapping[str, Any]) -> str:
    """Return where a run was cut last, from its summary; empty where that is unknown or clients differed."""
    cuts = {str(plan.get("cut", "")) for plan in summary.get("plan", {}).values()}
    return cuts.pop() if len(cuts) == 1 else ""


def codec_warning(summary: Mapping[str, Any]) -> str:
    """Return a sentence where the run's accuracy with its codec differs from that without; else nothing."""
    coded, raw = summary.get("test_accuracy_codec"), summary.get("test_accuracy_raw")
    if coded is None or raw is None or abs(coded - raw) <= CODEC_COSTS:
        return ""
    return (
        f"The exported model has no codec at the cut: its test accuracy is {100 * raw:.2f} %, with the run's codec it "
        f"was {100 * coded:.2f} %."
    )


def _refuse_existing(file: Path, force: bool) -> None:
    if file.exists() and not force:
        raise ConfigError(f"{file} exists already: choose another --to, or replace it with --force.")


def _write_state(request: Request, path: Path) -> list[Path]:
    torch.save(request.trained.model.state_dict(), path)
    return [path]


def _write_safetensors(request: Request, path: Path) -> list[Path]:
    _save(request.trained.model.state_dict(), path, {})
    return [path]


def _write_parts(request: Request, path: Path) -> list[Path]:
    """Write what lies in front of the cut and what lies behind it, each tensor under its own name."""
    if not request.cut:
        raise ConfigError(
            "The run does not say where its model is cut, or not once for all: name the place with --cut."
        )
    trained = request.trained
    traced = trace(trained.model, torch.zeros(2, *trained.shape))
    parts = dict(zip(("front", "back"), traced.split(request.cut), strict=True))
    files = {name: path.with_name(f"{path.stem}-{name}.safetensors") for name in parts}
    for name, part in parts.items():
        _save(part.state_dict(), files[name], {"part": name, "cut": traced.cut(request.cut).name})
    return list(files.values())


def _save(state: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    path.write_bytes(
        save(tensors, {"format": "pt", **about})
    )  # `save_file` would make a file that is its owner's alone


def _write_graph(write: Callable[[Trained, Path], None]) -> Writer:
    def writer(request: Request, path: Path) -> list[Path]:
        write(request.trained, path)
        return sorted(each for each in path.parent.iterdir())

    return writer


FORMATS: dict[str, Writer] = {
    ".pt": _write_state,
    ".safetensors": _write_safetensors,
    ".onnx": _write_graph(write_onnx),
    ".pt2": _write_graph(write_program),
    ".ts": _write_graph(write_torchscript),
    ".torchscript": _write_graph(write_torchscript),
    ".front+back": _write_parts,
}
"""What writes each kind of file, by its suffix."""
