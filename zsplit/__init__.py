"""zsplit: split learning over ZeroMQ. One model, trained across machines that may not share their data.

The names below are loaded when they are first used: importing zsplit loads neither torch nor zmq.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsplit.codec import codec
    from zsplit.config import Config, load_config
    from zsplit.data import Data, from_datasets
    from zsplit.errors import ZsplitError
    from zsplit.launch import Result, run_here
    from zsplit.model import CutPoint, cut_points, split
    from zsplit.train.peer import run_client, run_server

_HOMES = {
    "Config": "zsplit.config",
    "CutPoint": "zsplit.model",
    "Data": "zsplit.data",
    "Result": "zsplit.launch",
    "ZsplitError": "zsplit.errors",
    "codec": "zsplit.codec",
    "cut_points": "zsplit.model",
    "from_datasets": "zsplit.data",
    "load_config": "zsplit.config",
    "run_client": "zsplit.train.peer",
    "run_here": "zsplit.launch",
    "run_server": "zsplit.train.peer",
    "split": "zsplit.model",
}

__all__ = [
    "Config",
    "CutPoint",
    "Data",
    "Result",
    "ZsplitError",
    "codec",
    "cut_points",
    "from_datasets",
    "load_config",
    "run_client",
    "run_here",
    "run_server",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zsplit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
