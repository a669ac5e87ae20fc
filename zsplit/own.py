"""Functions of one's own that a config names: imported only from modules that this peer was started to allow."""

from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

from zsplit.errors import ConfigError


def load(spec: str, allowed: Collection[str], key: str) -> Callable[..., Any]:
    """Return the function of `package.module:function`, the value of a key of the config.

    Raises `ConfigError` where the module is not among those allowed, cannot be imported or has no such function.
    """
    module, _, name = spec.partition(":")
    if module not in allowed:
        raise ConfigError(f'{key} = "{spec}" is not allowed here: start this peer with --allow {module}.')
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f'{key} = "{spec}" cannot be imported ({error}): mend that, or name another.') from error
    if not callable(found):
        raise ConfigError(f'{key} = "{spec}" is no function: name one.')
    function: Callable[..., Any] = found
    return function
