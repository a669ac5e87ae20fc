"""Writing a run's model for others: the suffix of the file says how."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from zsplit.after.coded import check_cuts, coded
from zsplit.after.graphs import write_onnx, write_program, write_torchscript
from zsplit.after.trained import Trained
from zsplit.errors import ConfigError, StorageError
from zsplit.model import Part, Traced, trace

CODEC_COSTS = 0.01
"""Accuracies with and without the codec that differ by more than this are worth a warning."""


class Request(NamedTuple):
    """What is to be written: the model on the CPU, and where it is cut (nothing: nowhere known)."""

    trained: Trained
    cuts: tuple[str, ...]


Writer = Callable[[Request, Path], list[Path]]
"""Writes a model at a path; returns the files that it made."""


def export(
    trained: Trained, target: Path, cuts: Sequence[str] = (), force: bool = False, codec: str = ""
) -> list[Path]:
    """Write the model, as the target's suffix says; return the files. They appear whole or not at all.

    `cuts`, one or (U-shaped) two, are needed for `.front+back`, and where a `codec` becomes a layer at each of them.
    Raises ConfigError for an unknown suffix, a format that holds no codec, a file that exists already (unless
    `force`), missing packages and a model that the format cannot hold, PlanError for a cut that does not exist,
    StorageError where nothing can be written.
    """
    writer = FORMATS[known_suffix(target, bool(codec))]
    trained = trained._replace(model=trained.model.cpu(), device=torch.device("cpu"))
    if codec:
        trained = trained._replace(model=coded(trained, cuts, codec))
    request = Request(trained, tuple(cuts))
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


def known_suffix(target: Path, with_codec: bool = False) -> str:
    """Return the target's suffix. Raises ConfigError where no format has it, or its format has no place for a codec."""
    if target.suffix not in FORMATS:
        raise ConfigError(f"{target} does not say what to write: end it in {', '.join(FORMATS)}.")
    if with_codec and target.suffix not in GRAPHS:
        raise ConfigError(
            f"{target} holds weights alone, and a codec has none: leave --with-codec out, "
            f"or end it in {', '.join(GRAPHS)}."
        )
    return target.suffix


def codec_warning(summary: Mapping[str, Any]) -> str:
    """Return a sentence where the run's accuracy with its codec differs from that without; else nothing."""
    through, raw = summary.get("test_accuracy_codec"), summary.get("test_accuracy_raw")
    if through is None or raw is None or abs(through - raw) <= CODEC_COSTS:
        return ""
    return (
        f"The exported model has no codec at the cut: its test accuracy is {100 * raw:.2f} %, with the run's codec it "
        f"was {100 * through:.2f} %; --with-codec puts it there."
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
    """Write what lies in front of the cut and what lies behind it, each tensor under its own name.

    With two cuts there are three parts. What lies before the model's input or behind its output is none.
    """
    check_cuts(request.cuts)
    traced = trace(request.trained.model, torch.zeros(2, *request.trained.shape))
    cuts = dict(zip(("cut", "tail"), (traced.cut(cut).name for cut in request.cuts), strict=False))
    parts = _parts(traced, request.cuts)
    if len(parts) == 1:
        raise ConfigError(
            f"The model is cut at its {cuts['cut']}, so one part is all of it: write .safetensors, "
            "or name a place inside it with --cut."
        )
    files = {name: path.with_name(f"{path.stem}-{name}.safetensors") for name in parts}
    for name, part in parts.items():
        _save(part.state_dict(), files[name], {"part": name, **cuts})
    return list(files.values())


def _parts(traced: Traced, cuts: Sequence[str]) -> dict[str, Part]:
    """Return the parts by name, those at the ends of the model only where there is something of it in them."""
    names = ("front", "back") if len(cuts) == 1 else ("front", "middle", "tail")
    empty = {names[0]: traced.is_input(cuts[0]), names[-1]: traced.is_output(cuts[-1])}
    return {name: part for name, part in zip(names, traced.split(*cuts), strict=True) if not empty.get(name)}


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


GRAPHS: dict[str, Writer] = {
    ".onnx": _write_graph(write_onnx),
    ".pt2": _write_graph(write_program),
    ".ts": _write_graph(write_torchscript),
    ".torchscript": _write_graph(write_torchscript),
}
"""What writes each kind of file that holds the computation as well as the weights, by its suffix."""

FORMATS: dict[str, Writer] = {
    ".pt": _write_state,
    ".safetensors": _write_safetensors,
    **GRAPHS,
    ".front+back": _write_parts,
}
"""What writes each kind of file, by its suffix."""
