"""The folder that a run left, read file by file when it is asked for: config, summary, rounds, weights."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from zsplit.config import Config
from zsplit.errors import ConfigError, RemoteProtocolError, StorageError
from zsplit.wire.events import RoundEvent, decode_event
from zsplit_broker.record import SUMMARY, check_folder, read_config

METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
VERSIONS = "versions"


class RunFolder(NamedTuple):
    """A run by its folder. Made by `open_run`; each method reads the files that it is about, and nothing is kept."""

    path: Path

    def config(self) -> Config:
        """Return the config that the run had. Raises ConfigError where the file is damaged."""
        return read_config(self.path)

    def summary(self) -> dict[str, Any]:
        """Return `summary.json`; empty where the run goes on, or its broker was killed. Raises StorageError."""
        text = _text(self.path / SUMMARY)
        try:
            summary = json.loads(text or "{}")
        except ValueError as error:
            raise _damaged(self.path / SUMMARY, str(error)) from error
        if not isinstance(summary, dict):
            raise _damaged(self.path / SUMMARY, "it is no table")
        return summary

    def rounds(self) -> list[RoundEvent]:
        """Return the rounds that are over, in order; a line that a crash tore is no round. Raises StorageError."""
        *whole, _ = _text(self.path / METRICS).split("\n")
        rounds = {round_.round: round_ for round_ in _rounds(self.path / METRICS, whole)}
        return [rounds[number] for number in sorted(rounds)]

    def finished(self) -> bool:
        """Whether the run came to its planned end."""
        return self.summary().get("ok") is True

    def weights(self) -> Path:
        """Return the file of the newest weights: the merged model, or the last version of a run that was stopped.

        A version's file holds optimizer buffers beside them. Raises ConfigError where nothing was stored.
        """
        if (self.path / MODEL).is_file():
            return self.path / MODEL
        last = (self.summary().get("stored") or [""])[-1]
        known = self.path / VERSIONS / f"{last}.safetensors"
        found = [known] if known.is_file() else list((self.path / VERSIONS).glob("*.safetensors"))
        if not found:
            raise ConfigError(
                f"{self.path} holds no version of the model: the run ended before one was stored, so start it again."
            )
        return max(found, key=lambda path: path.stat().st_mtime_ns)


def open_run(path: Path) -> RunFolder:
    """Return the run in a folder. Raises ConfigError where there is none."""
    path = path.expanduser()
    check_folder(path)
    return RunFolder(path)


def _rounds(path: Path, lines: Iterable[str]) -> Iterable[RoundEvent]:
    for number, line in enumerate(lines, 1):
        try:
            event = decode_event(line.encode())
        except RemoteProtocolError as error:
            raise _damaged(path, f"line {number} is {error}") from error
        if isinstance(event, RoundEvent):
            yield event


def _text(path: Path) -> str:
    """Return a file's text, nothing where there is no such file. Raises StorageError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is not text in UTF-8") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}): mend that and try again.") from error


def _damaged(path: Path, why: str) -> StorageError:
    return StorageError(f"{path} is damaged ({why}): put it back from a copy, or run again.")
