"""This machine: device, threads, and what bit-identical results depend on."""

import os
import socket
from collections.abc import Mapping

import torch

from zsplit.config import Config
from zsplit.errors import ConfigError
from zsplit.memory import keep_freed
from zsplit.wire.messages import Prepared


def choose_device(asked: str) -> torch.device:
    """Return the device; `auto` is a GPU where there is one. Raises ConfigError for one that is not there."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {asked!r} cannot be used on this machine: use --device auto or cpu.") from error
    return device


def started_together(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process, and others with it."""
    return "TORCHELASTIC_RUN_ID" in environment and int(environment.get("WORLD_SIZE", "1")) > 1


def set_up(config: Config, threads: int) -> None:
    """Fix what the run wants fixed for the whole process: threads, deterministic algorithms; and keep its memory."""
    keep_freed()
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(config.run.deterministic)


def use_threads(threads: int) -> None:
    """Compute with as many threads as the grant says: the last bits of a turn depend on it."""
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def describe(
    device: torch.device,
    cut: str,
    train: int = 0,
    validation: int = 0,
    test: int = 0,
    tail: str = "",
    earliest: str = "",
) -> Prepared:
    """Return what this peer tells the broker once it is ready. Sizes in samples."""
    return Prepared(
        cut=cut,
        tail=tail,
        earliest=earliest,
        train=train,
        validation=validation,
        test=test,
        torch=str(torch.__version__),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        device=str(device),
        host=socket.gethostname(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
