"""The run's folder as a person finds it: config, profile, plan, metrics and summary."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from zsplit.config import Config, load_config, to_toml
from zsplit.errors import ConfigError, StorageError
from zsplit.plan import Situation
from zsplit.plan import file as plan_file
from zsplit_broker.disk import PARTIAL, storage_errors, write_all
from zsplit_broker.events import Planned
from zsplit_broker.journal import JOURNAL, LOCK
from zsplit_broker.timeline import TIMELINE

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
PLAN = "plan.json"
PROFILE = "profile.json"
SUMMARY = "summary.json"


def choose_folder(config: Config | None, out: str | None = None) -> Path:
    """Return the folder of a run: the one asked for, else the first free `runs/<name>-<n>`.

    Raises ConfigError where it exists already, is not empty and holds no run: nothing is ever overwritten.
    """
    asked = out or (config.run.out if config is not None else "")
    if asked:
        folder = Path(asked).expanduser()
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if free or (folder / JOURNAL).exists():
            return folder
        raise ConfigError(f"{folder} exists already and is not overwritten: choose another --out")
    name = config.run.name if config is not None else "run"
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def create_folder(folder: Path, config: Config) -> None:
    """Make the folder and write the config as resolved. Raises StorageError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(to_toml(config))
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error


def check_folder(folder: Path) -> None:
    """Raise ConfigError where no run is in a folder."""
    if not folder.is_dir():
        raise ConfigError(f"There is no run {folder}: give the folder of a run, such as runs/digits-1.")
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} is no run's folder, it has no {CONFIG}: give one such as runs/digits-1.")


def read_config(folder: Path) -> Config:
    """Return the config that the run in a folder has. Raises ConfigError where there is none, or it is damaged."""
    check_folder(folder)
    return load_config(folder / CONFIG)


def remove_folder(folder: Path) -> None:
    """Remove what the broker put into a folder, and the folder where nothing else is in it."""
    for name in (CONFIG, JOURNAL, LOCK, PLAN, PROFILE, SUMMARY, TIMELINE):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's files stay
        (folder / "versions").rmdir()
        folder.rmdir()


def append_metrics(folder: Path, body: bytes) -> None:
    """Add a round's figures, as they were published, to `metrics.jsonl`: all of the line or nothing."""
    line = body + b"\n"
    with storage_errors(folder, len(line), "what was stored is intact"):
        file = os.open(folder / METRICS, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            end = os.fstat(file).st_size
            try:
                write_all(file, line, end)
            except OSError:
                os.ftruncate(file, end)
                raise
        finally:
            os.close(file)


def trim_metrics(folder: Path, rounds: int) -> int:
    """Cut `metrics.jsonl` behind the lines of so many rounds, and before a torn one; return how many there are."""
    file = folder / METRICS
    if not file.exists():
        return 0
    kept = length = 0
    for line in file.read_bytes().split(b"\n")[:-1]:
        if kept == rounds or _round_of(line) != kept + 1:
            break
        kept, length = kept + 1, length + len(line) + 1
    os.truncate(file, length)
    return kept


def _round_of(line: bytes) -> int:
    """Return the round of a line of figures, 0 where it is none."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return int(json.loads(line)["round"])
    return 0


def forget_ending(folder: Path) -> None:
    """Remove what says how the run ended: it goes on."""
    for name in (SUMMARY, MODEL):
        (folder / name).unlink(missing_ok=True)


def put_timeline_aside(folder: Path, epoch: int) -> None:
    """Give the timeline that an earlier broker of the run has written a name of its own."""
    if (folder / TIMELINE).exists():
        (folder / TIMELINE).rename(folder / f"timeline-{epoch}.json")


def write_summary(folder: Path, summary: dict[str, object]) -> None:
    """Write `summary.json`, whole or not at all. Raises StorageError."""
    _write(folder, SUMMARY, json.dumps(summary, indent=2).encode() + b"\n")


def is_concluded(folder: Path) -> bool:
    """Whether the summary in a folder is that of a run that finished."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return bool(json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["ok"])
    return False


def write_situation(folder: Path, situation: Situation) -> None:
    """Write `profile.json`, what a plan was made from, whole or not at all. Raises StorageError."""
    _write(folder, PROFILE, msgspec.json.format(msgspec.json.encode(situation), indent=1) + b"\n")


def write_plans(folder: Path, planned: Iterable[Planned]) -> None:
    """Write `plan.json`, all that was planned so far, whole or not at all. Raises StorageError."""
    rows = [
        plan_file.Planned(round=event.round, plans=event.plans, predicted=event.predicted, sentence=event.sentence)
        for event in planned
    ]
    _write(folder, PLAN, plan_file.encode_plans(rows))


def read_plans(config: Config) -> list[Planned]:
    """Return the plans that the config names a file of (none: no plans). Raises ConfigError where it cannot be used."""
    if not config.plan.file:
        return []
    rows = plan_file.read_plans(Path(config.plan.file), config.schedule.clients)
    return [Planned(row.round, row.plans, row.predicted, row.sentence) for row in rows]


def _write(folder: Path, name: str, data: bytes) -> None:
    draft = folder / (name + PARTIAL)
    with storage_errors(folder, len(data), "what was stored is intact"):
        draft.write_bytes(data)
        draft.replace(folder / name)
