"""A sweep: one config, keys over several values, each combination with several seeds; means and deviations."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import msgspec

from zsplit.config import Config, load_config
from zsplit.errors import ConfigError
from zsplit.results.compare import varying
from zsplit.results.figures import Figures
from zsplit.results.folder import RunFolder, open_run

COMMA = r",(?!\s*\w+=)"
"""Between two values: not between the options of one, as in `ms:ratio=0.99,bits=2`."""


class Point(NamedTuple):
    """One run of a sweep: the values of the keys that vary, as they were written, its seed and its config."""

    values: Mapping[str, str]
    config: Config

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.config.run.seed

    @property
    def title(self) -> str:
        """What tells the run from the others: `train.lr=0.1, seed 0`."""
        return ", ".join([*(f"{key}={value}" for key, value in self.values.items()), f"seed {self.seed}"])

    @property
    def folder(self) -> str:
        """Name of the run's folder: the same for the same values, whatever else the sweep has."""
        texts = [*(f"{key}={value}" for key, value in self.values.items()), f"seed={self.seed}"]
        name = "__".join(texts)
        if re.fullmatch(r"[\w.=+-]{1,120}", name):
            return name
        plain = re.sub(r"[^\w.=+-]+", "_", name)[:100]
        return f"{plain}-{blake2b(name.encode(), digest_size=4).hexdigest()}"


class Axis(NamedTuple):
    """A key and the values that it takes."""

    key: str
    values: tuple[str, ...]


class Spread(msgspec.Struct, frozen=True):
    """Mean and sample standard deviation (n − 1) of a figure; no deviation of one value."""

    mean: float
    deviation: float | None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One combination of values over its seeds: how many runs there are, how many failed, and what the others gave."""

    values: dict[str, str]
    runs: int
    failed: int
    test_accuracy: Spread | None
    test_loss: Spread | None
    seconds: Spread | None
    bytes_up: Spread | None
    bytes_down: Spread | None
    idle_client: Spread | None


def axis(text: str) -> Axis:
    """Return the axis that `key=a,b,c` is; a comma before `name=` is a codec's, and belongs to the value.

    Where values have other commas, `;` parts them, and then nothing else does. Raises ConfigError for a text without
    key or values, for a value that stands twice, and for the seed.
    """
    key, _, rest = (part.strip() for part in text.partition("="))
    values = tuple(value for part in re.split(";" if ";" in rest else COMMA, rest) if (value := part.strip()))
    if not key or not values:
        raise ConfigError(f"`{text}` gives no values to a key: write --over key=a,b,c, such as train.lr=0.01,0.1.")
    if key == "run.seed":
        raise ConfigError("`run.seed` is no key to sweep over: --seeds says how many seeds each combination gets.")
    if len(set(values)) < len(values):
        raise ConfigError(f"`{text}` names a value twice: name each once.")
    return Axis(key, values)


def points(source: Path | None, overrides: Sequence[str], axes: Sequence[Axis], seeds: int) -> list[Point]:
    """Return the runs of a sweep: every combination, with as many seeds each, from the config's own upwards.

    All configs are made here, so that a wrong one is known before anything runs. Raises ConfigError.
    """
    names = [axis.key for axis in axes]
    if len(set(names)) < len(names):
        raise ConfigError(f"--over names {max(names, key=names.count)} twice: give it all values at once.")
    first = load_config(source, overrides).run.seed
    return [
        _point(source, overrides, dict(zip(names, values, strict=True)), seed)
        for values in product(*(axis.values for axis in axes))
        for seed in range(first, first + seeds)
    ]


def _point(source: Path | None, overrides: Sequence[str], values: Mapping[str, str], seed: int) -> Point:
    own = [*(f"{key}={value}" for key, value in values.items()), f"run.seed={seed}"]
    return Point(values, load_config(source, [*overrides, *own]))


def done(point: Point, out: Path) -> RunFolder | None:
    """Return the finished run of a point that is in the sweep's folder already, or None.

    Raises ConfigError where what is there was run with another config.
    """
    folder = out / point.folder
    if not (folder / "config.toml").is_file():
        return None
    run = open_run(folder)
    other = [key for key in varying([point.config, run.config()]) if not key.endswith(".threads")]
    if other:
        raise ConfigError(f"{folder} holds a run with another {', '.join(other)}: choose another --out.")
    return run if run.finished() else None


def clear(folder: Path) -> None:
    """Move what an unfinished run left out of the way, so that it can be run again."""
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.unfinished-{number}")).exists():
        number += 1
    folder.rename(aside)


def rows_of(results: Sequence[tuple[Point, Figures | None]]) -> Iterator[Row]:
    """Yield a row for each combination of values, in order. None is a run that failed."""
    combinations: dict[tuple[str, ...], list[tuple[Point, Figures | None]]] = {}
    for point, figures in results:
        combinations.setdefault(tuple(point.values.values()), []).append((point, figures))
    for members in combinations.values():
        yield _row(members[0][0].values, [figures for _, figures in members])


def _row(values: Mapping[str, str], results: Sequence[Figures | None]) -> Row:
    found = [figures for figures in results if figures is not None]
    return Row(
        values=dict(values),
        runs=len(results),
        failed=len(results) - len(found),
        test_accuracy=spread(each.test_accuracy for each in found),
        test_loss=spread(each.test_loss for each in found),
        seconds=spread(each.seconds for each in found),
        bytes_up=spread(each.bytes_up for each in found),
        bytes_down=spread(each.bytes_down for each in found),
        idle_client=spread(each.idle_client for each in found),
    )


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean and deviation of what is known; None of nothing."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    return Spread(mean(known), stdev(known) if len(known) > 1 else None)
