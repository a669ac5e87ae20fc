"""From the text of a spec to its stages: `name:key=value,key=value+name…`. What is wrong is pointed at."""

import difflib
from functools import lru_cache
from typing import NoReturn

from zsplit.errors import ConfigError
from zsplit.spec.stages import (
    KINDS,
    Half,
    Kind,
    Lz4,
    Mask,
    Ms,
    Quantize,
    RandTopK,
    Raw,
    Select,
    Spec,
    Stage,
    TopK,
    Values,
)

LONGEST = 200
"""Characters of a spec: it stands in the header of every message."""


@lru_cache(maxsize=256)
def parse(text: str, key: str = "The codec") -> Spec:
    """Return the spec that a text stands for.

    Raises ConfigError with one sentence that names `key`, where in the text it is wrong, and what is right.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"{key} has {len(text)} characters: the longest codec that can be named has {LONGEST}.")
    return _Reader(text, key).read()


ORDER = (
    "the order is one of topk, randtopk and mask, then one of raw, half, bf16, quantize and ms, then lz4, "
    "each at most once"
)


class _Reader:
    """One text on its way to a spec; `at` counts characters from 0, people from 1."""

    def __init__(self, text: str, key: str) -> None:
        self._text, self._key = text, key

    def read(self) -> Spec:
        at = 0
        stages: list[tuple[int, Stage]] = []
        for part in self._text.split("+"):
            stages.append((at, self._stage(part, at)))
            at += len(part) + 1
        return self._joined(stages)

    def _joined(self, stages: list[tuple[int, Stage]]) -> Spec:
        """Return the stages in their places: at most one that selects, one that writes values, and `lz4`."""
        select: Select | None = None
        values: Values | None = None
        lz4 = False
        for at, stage in stages:
            match stage:
                case TopK() | RandTopK() | Mask() if select is None and values is None and not lz4:
                    select = stage
                case Raw() | Half() | Quantize() | Ms() if values is None and not lz4:
                    if select is not None and needs_shape(stage):
                        self._fail(at, "it needs the whole tensor, and what stands before it leaves single values")
                    values = stage
                case Lz4() if not lz4:
                    lz4 = True
                case _:
                    self._fail(at, ORDER)
        return Spec(self._text, select, values or Raw(), lz4)

    def _stage(self, part: str, at: int) -> Stage:
        name, colon, rest = part.partition(":")
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            there = f"the nearest is {near[0]}" if near else f"there are {', '.join(KINDS)}"
            self._fail(at, f'"{name}" is not a codec, {there}')
        kind, values = KINDS[name], {}
        at += len(name) + 1
        for option in rest.split(",") if colon else []:
            key, value = self._option(name, kind, option, at)
            if key in values:
                self._fail(at, f"{key} is set twice")
            values[key] = value
            at += len(option) + 1
        for key in kind.needs:
            if key not in values:
                self._fail(at - 1, f"{name} needs {key}, such as {kind.example}")
        stage: Stage = kind.make(**values)
        return stage

    def _option(self, name: str, kind: Kind, text: str, at: int) -> tuple[str, object]:
        key, equals, value = text.partition("=")
        if key not in kind.options:
            has = f"it has {', '.join(kind.options)}" if kind.options else "it has none"
            self._fail(at, f'"{key}" is not an option of {name}, {has}')
        read = kind.options[key].read(value) if equals else None
        if read is None:
            found = f'not "{value}"' if value else "and nothing is there"
            self._fail(at + len(key) + len(equals), f"{key} must be {kind.options[key].words}, {found}")
        return key, read

    def _fail(self, at: int, why: str) -> NoReturn:
        raise ConfigError(f'{self._key} "{self._text}" is wrong at character {at + 1}: {why}.')


def needs_shape(stage: Values) -> bool:
    """Whether a way to write values must see the whole tensor."""
    return isinstance(stage, Ms) or (isinstance(stage, Quantize) and stage.scope == "channel")
