"""Texts such as `dirichlet:alpha=0.5`: how they are read, and the sentence that points at what is wrong in one."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from zsplit.config.keys import as_toml
from zsplit.errors import ConfigError


@dataclass(frozen=True)
class Stretch:
    """What follows a name in the text of a key: `rest`, from character `at` on; `form` says how to write it all."""

    key: str
    text: str
    at: int
    rest: str
    form: str

    def refusal(self, offset: int = 0) -> ConfigError:
        """Return the error that points at a character of the stretch."""
        at = self.at + offset
        if at >= len(self.text):
            where = "ends too early"
        else:
            where = f"cannot be read from character {at + 1} on, {as_toml(self.text[at:])}"
        return ConfigError(f"{self.key} = {as_toml(self.text)} {where}: write {self.form}.")

    def parameter(self, name: str, kind: Callable[[str], float]) -> float:
        """Return the number of `name=NUMBER`. Raises `ConfigError` for anything else, and where it is not above 0."""
        found, equals, value = self.rest.partition("=")
        if found != name or not equals:
            raise self.refusal()
        try:
            number = kind(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise self.refusal(len(name) + 1)
        return number

    def nothing(self) -> None:
        """Raise `ConfigError` where anything follows the name."""
        if self.rest or self.text[self.at - 1 : self.at] == ":":
            raise self.refusal(-1)


def unknown(key: str, text: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a name that does not exist."""
    names = list(known)
    near = get_close_matches(name, names, n=1)
    way_out = f"the nearest is {as_toml(near[0])}" if near else f"there are {', '.join(names)}"
    found = as_toml(text) if text == name else f"{as_toml(text)} names {as_toml(name)}, which"
    return ConfigError(f"{key} = {found} does not exist: {way_out}.")
