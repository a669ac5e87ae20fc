"""`results.csv`: a line for each run, gathered over any number of comparisons and sweeps, as PipeLearn does."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from zsplit.config import Config
from zsplit.errors import ConfigError, StorageError
from zsplit.results.compare import HOW, value_of
from zsplit.results.figures import Figures

RESULTS = "results.csv"

ALWAYS = {
    **HOW,
    "model": "model.name",
    "data": "data.name",
    "clients": "schedule.clients",
    "seed": "run.seed",
}
"""Columns that every run has, and the keys that they show."""


def line_of(figures: Figures, config: Config, keys: Iterable[str]) -> dict[str, str]:
    """Return a run's line: what it was, the values of these keys, and its figures; unknown figures are empty."""
    found: dict[str, object] = msgspec.to_builtins(figures)
    line = {"run": figures.run, "name": figures.name}
    line |= {column: value_of(config, key) for column, key in ALWAYS.items()}
    line |= {key: value_of(config, key) for key in keys if key not in ALWAYS.values()}
    return line | {name: "" if value is None else str(value) for name, value in found.items() if name not in line}


def gather(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Put the lines into the file: new at its end, or in the place of the same run's line; columns are added.

    Raises ConfigError where the file is something else, StorageError where it cannot be read or written.
    """
    known = {line["run"]: dict(line) for line in _read(path)}
    for line in lines:
        known[line["run"]] = known.get(line["run"], {}) | dict(line)
    columns = list(dict.fromkeys(column for line in known.values() for column in line))
    draft = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(known.values())
        draft.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}): name another file.") from error


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file, restval=""))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}): name another file.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is no table of results: name a new file, or one that zsplit wrote.") from error
    if any("run" not in line or None in line for line in lines):
        raise ConfigError(f"{path} is no table of results: name a new file, or one that zsplit wrote.")
    return lines
