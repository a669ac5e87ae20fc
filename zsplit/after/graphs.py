"""Models as graphs that run without their Python: ONNX, torch.export and TorchScript. Any size of batch fits them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from zsplit.after.trained import Trained
from zsplit.errors import ConfigError
from zsplit.model.tracer import first_line

ONNX_PACKAGES = ("onnx", "onnxscript")
"""What torch's ONNX exporter needs: the extra `onnx` of this package."""

LARGEST = 2**31 - 2**20
"""Bytes of weights that an ONNX file can hold beside its graph; more lie in a second file."""


def write_onnx(trained: Trained, path: Path) -> None:
    """Write an ONNX model with the input `input` and the output `logits`.

    Raises ConfigError where the packages are missing, and for a model that ONNX cannot hold.
    """
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Writing ONNX needs {' and '.join(missing)}, not installed here: "
            "pip install 'zsplit[onnx]', or write .pt2."
        )
    size = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
    with _exporting("ONNX"):
        torch.onnx.export(
            _program(trained),
            (),
            path,
            input_names=["input"],
            output_names=["logits"],
            external_data=size > LARGEST,
            verbose=False,
        )


def write_program(trained: Trained, path: Path) -> None:
    """Write what `torch.export.load` reads. Raises ConfigError for a model that torch.export cannot follow."""
    with _exporting("an exported program"):
        torch.export.save(_program(trained), path)


def write_torchscript(trained: Trained, path: Path) -> None:
    """Write what `torch.jit.load` reads. Raises ConfigError for a model that cannot be traced.

    torch has deprecated TorchScript, and says so whenever it is written or read; `.pt2` is its successor.
    """
    with _exporting("TorchScript"), torch.no_grad():
        traced = torch.jit.trace(trained.model, _example(trained))  # type: ignore[no-untyped-call]
        torch.jit.save(traced, path)


def _example(trained: Trained) -> Tensor:
    """Return a batch. Of two, since torch.export takes a dimension of one for a constant."""
    return torch.zeros(2, *trained.shape)


def _program(trained: Trained) -> ExportedProgram:
    return torch.export.export(trained.model, (_example(trained),), dynamic_shapes=({0: Dim("batch")},))


@contextmanager
def _exporting(what: str) -> Iterator[None]:
    """Turn whatever an exporter raises into a sentence. What it warns of nobody at a command line could mend."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ConfigError, OSError):
        raise
    # The exporters have no errors in common.
    except Exception as error:
        raise ConfigError(
            f"The model cannot be written as {what} ({first_line(error)}): write .safetensors."
        ) from error
