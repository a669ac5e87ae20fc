"""Runs side by side: what each came to, in which keys they differ, and what it took to reach an accuracy."""

from collections.abc import Sequence

import msgspec

from zsplit.config import Config, differences, keys
from zsplit.config.keys import as_toml
from zsplit.errors import ConfigError
from zsplit.results.figures import Course, Figures, course_of, figures_of, reached
from zsplit.results.folder import RunFolder

APART = ("run.name", "run.out", "broker.")
"""Keys, or beginnings of keys, in which any two runs may differ without being different experiments."""


HOW = {
    "policy": "schedule.policy",
    "server_model": "schedule.server_model",
    "labels": "train.labels",
    "codec_up": "codec.up",
    "codec_down": "codec.down",
    "codec_weights": "codec.weights",
}
"""What says how a run trained, whether runs differ in it or not, and the keys of it."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a comparison: its figures, how it trained, the values of the keys that differ, its course, the target.

    `target` is None where no target was asked for or the run did not reach it.
    """

    figures: Figures
    how: dict[str, str]
    keys: dict[str, str]
    course: list[Course]
    target: Course | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Runs in the order in which they were named, and the accuracy that they were to reach, if any."""

    target_accuracy: float | None
    runs: list[Entry]


def compare(runs: Sequence[RunFolder], target: float | None = None) -> Comparison:
    """Return the runs side by side. Raises ConfigError for a run named twice, StorageError for a damaged folder."""
    twice = {run.path for run in runs if [other.path.resolve() for other in runs].count(run.path.resolve()) > 1}
    if twice:
        raise ConfigError(f"{min(twice)} is named twice: name each run once.")
    configs = [run.config() for run in runs]
    varied = varying(configs)
    entries = [_entry(run, config, varied, target) for run, config in zip(runs, configs, strict=True)]
    return Comparison(target_accuracy=target, runs=entries)


def _entry(run: RunFolder, config: Config, varied: Sequence[str], target: float | None) -> Entry:
    course = course_of(run.rounds())
    return Entry(
        figures=figures_of(run),
        how={name: value_of(config, key) for name, key in HOW.items()},
        keys={key: value_of(config, key) for key in varied},
        course=course,
        target=None if target is None else reached(course, target),
    )


def varying(configs: Sequence[Config]) -> list[str]:
    """Return the keys in which any of the configs differ, in the order of the config, without those of `APART`."""
    found = {key for config in configs[1:] for key in differences(configs[0], config)}
    return [each.key for each in keys() if each.key in found and not each.key.startswith(APART)]


def value_of(config: Config, key: str) -> str:
    """Return the value of a key as text: strings bare, all else as TOML writes it, nothing where it is unset."""
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    return value if isinstance(value, str) else "" if value is None else as_toml(msgspec.to_builtins(value))
