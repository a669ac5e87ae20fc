"""The run's folder as a person finds it: config, metrics, summary and the merged model."""

import contextlib
import json
from pathlib import Path

from zsplit.config import Config, to_toml
from zsplit.errors import ConfigError, StorageError
from zsplit.wire.messages import Tally
from zsplit_broker.disk import PARTIAL, storage_errors
from zsplit_broker.journal import JOURNAL, LOCK
from zsplit_broker.scheduler import Scheduler
from zsplit_broker.tally import add, mean, quantile


def choose_folder(config: Config, out: str | None = None) -> Path:
    """Return the folder of a new run: the one asked for, else the first free `runs/<name>-<n>`.

    Raises ConfigError where it exists already and is not empty: nothing is ever overwritten.
    """
    asked = out or config.run.out
    if asked:
        folder = Path(asked).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists already and is not overwritten: choose another --out")
        return folder
    number = 1
    while (folder := Path("runs") / f"{config.run.name}-{number}").exists():
        number += 1
    return folder


def create_folder(folder: Path, config: Config) -> None:
    """Make the folder and write the config as resolved. Raises StorageError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(to_toml(config))
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error


def remove_folder(folder: Path) -> None:
    """Remove what the broker put into a folder, and the folder where nothing else is in it."""
    for name in ("config.toml", JOURNAL, LOCK, "summary.json"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's files stay
        (folder / "versions").rmdir()
        folder.rmdir()


def append_metrics(folder: Path, body: bytes) -> None:
    """Add a round's figures, as they were published, to `metrics.jsonl`."""
    with storage_errors(folder, len(body), "what was stored is intact"), (folder / "metrics.jsonl").open("ab") as file:
        file.write(body + b"\n")


def write_summary(folder: Path, summary: dict[str, object]) -> None:
    """Write `summary.json`, whole or not at all. Raises StorageError."""
    text = json.dumps(summary, indent=2) + "\n"
    draft = folder / f"summary.json{PARTIAL}"
    with storage_errors(folder, len(text), "what was stored is intact"):
        draft.write_text(text)
        draft.replace(folder / "summary.json")


def summarise(scheduler: Scheduler, run: str, folder: Path) -> dict[str, object]:
    """Return the figures of a run, all from the tallies of the leases that count."""
    config, history = scheduler.config, scheduler.history
    train = add(record.train for record in history)
    server = add(record.server for record in history)
    last = next((r.validation for r in reversed(history) if r.validation.samples), Tally())
    everything = add([train, server, *(r.validation for r in history), scheduler.test])
    wall = sum(record.seconds for record in history)
    servers = max(1, sum(role == "server" for role, _ in scheduler.peers))
    outcome = scheduler.outcome
    return {
        "name": config.run.name,
        "run": run,
        "ok": outcome is not None and outcome.ok,
        "sentence": outcome.sentence if outcome else "",
        "policy": config.schedule.policy,
        "model": config.model.name,
        "data": config.data.name,
        "cut": scheduler.plan.cut,
        "clients": config.schedule.clients,
        "rounds": len(history),
        "steps": train.steps,
        "samples": train.samples,
        "train_loss": mean(history[-1].train.loss_sum, history[-1].train.samples) if history else None,
        "val_loss": mean(last.loss_sum, last.samples),
        "val_accuracy": mean(last.top1, last.samples),
        "val_top5": mean(last.top5, last.samples),
        "test_loss": mean(scheduler.test.loss_sum, scheduler.test.samples),
        "test_accuracy": mean(scheduler.test.top1, scheduler.test.samples),
        "test_top5": mean(scheduler.test.top5, scheduler.test.samples),
        "seconds": scheduler.seconds,
        "step_seconds": {
            "median": quantile(train.step_seconds, 0.5),
            "p95": quantile(train.step_seconds, 0.95),
        },
        "bytes": bytes_by_kind(everything),
        "idle": {
            "client": train.idle / train.seconds if train.seconds else None,
            "server": max(0.0, 1 - server.seconds / (wall * servers)) if wall else None,
        },
        "model_file": str(folder / "model.safetensors") if outcome and outcome.ok else "",
        "versions": [record.version for record in history],
        "stored": list(scheduler.stored),
    }


def bytes_by_kind(tally: Tally) -> dict[str, object]:
    """Return bytes up and down as seen from the clients: all, and by kind."""
    kinds = {kind: {"up": up, "down": down} for kind, (up, down) in sorted(tally.traffic.items())}
    total = {way: sum(row[way] for row in kinds.values()) for way in ("up", "down")}
    return {**total, "kinds": kinds}
