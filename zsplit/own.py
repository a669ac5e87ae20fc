"""Code of one's own that a config names as `package.module:function`: loaded only where this peer was told to allow it.

The config comes from the broker, so a name in it must never be enough to make a peer import something.
"""

from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any, TypeVar

from zsplit.errors import ConfigError, ZsplitError

Made = TypeVar("Made")


def load(spec: str, allowed: Collection[str], key: str) -> Callable[..., Any]:
    """Return the function that `spec` names; `key` is the config's, for the sentence of a refusal.

    `allowed` are modules and packages; a package stands for all modules below it. Nothing is imported before the
    module is found among them, and a function that an allowed module only passes on from another is refused too.
    Raises ConfigError for what is not allowed, does not exist, or is no function.
    """
    module, name = _parts(spec, key)
    _check_allowed(module, allowed, f"{key} = {spec!r} would import {module}")
    function: Callable[..., Any] | None = getattr(_imported(module, f"{key} = {spec!r}"), name, None)
    if function is None or not callable(function):
        raise ConfigError(f"{key} = {spec!r}: {module} has no function {name}: define it at the module's top level.")
    home = str(getattr(function, "__module__", module))
    _check_allowed(home, allowed, f"{key} = {spec!r} is code of {home}")
    return function


def make(spec: str, allowed: Collection[str], key: str, kind: type[Made], *arguments: object) -> Made:
    """Return what the function that `spec` names makes of the arguments, checked to be of that kind.

    Raises ConfigError as `load` does, and where the function fails or makes something else.
    """
    function = load(spec, allowed, key)
    try:
        made = function(*arguments)
    except ZsplitError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{key} = {spec!r} failed with {type(error).__name__} ({_in_one_line(error)}): mend that function."
        ) from error
    if not isinstance(made, kind):
        raise ConfigError(f"{key} = {spec!r} gave a {type(made).__name__}: it has to return a {kind.__name__}.")
    return made


def _parts(spec: str, key: str) -> tuple[str, str]:
    module, colon, name = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ConfigError(f"{key} = {spec!r} names no function: write it as package.module:function.")
    return module, name


def _check_allowed(module: str, allowed: Collection[str], what: str) -> None:
    if not any(module == each or module.startswith(f"{each}.") for each in allowed):
        raise ConfigError(
            f"{what}, which this peer was not started with: if you trust that code, start the peer with "
            f"--allow {module} (in Python, allow=[{module!r}])."
        )


def _imported(module: str, what: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (module == missing or module.startswith(f"{missing}.")):
            raise ConfigError(
                f"{what}: there is no module {missing} here: install it, or start this peer in its folder."
            ) from error
        raise ConfigError(
            f"{what}: importing {module} failed with {type(error).__name__} ({_in_one_line(error)}): mend that module."
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
