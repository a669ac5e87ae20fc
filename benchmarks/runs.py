"""Runs of the product over a slow link, with another plan in every round; and that link for other ways to train."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import msgspec

import zsplit
from zsplit.config.shape import Row
from zsplit.plan import Decision, Situation, decide
from zsplit.plan.file import Planned, encode_plans
from zsplit.train.link.shaping import Line, lines
from zsplit.wire.messages import Plan

CLASSES, RATE, MOMENTUM = 10, 0.01, 0.9

RTT_MS = 10.0
"""What the slow links add to a round trip."""

Plans = Mapping[int, Plan]
"""The plan of each client."""


class Speed(NamedTuple):
    """A client's link: Mbit/s each way, 0: as it is; and what it adds to a round trip (ms)."""

    uplink: float = 0.0
    downlink: float = 0.0
    rtt: float = 0.0

    def __str__(self) -> str:
        return f"{self.uplink:g}/{self.downlink:g}" if self.uplink or self.downlink else "unlimited"


UNLIMITED = Speed()


def speed_of(text: str) -> Speed:
    """Return the link that a text such as `10/25` or `unlimited` says. Raises ValueError for another."""
    if text == str(UNLIMITED):
        return UNLIMITED
    uplink, downlink = map(float, text.split("/"))
    return Speed(uplink, downlink, RTT_MS)


class Task(NamedTuple):
    """What is trained: a model on samples of a shape in mini-batches of so many, by clients with such links.

    Each client takes `steps` steps in a round.
    """

    model: str
    shape: tuple[int, ...]
    batch: int
    speed: Speed
    clients: int
    steps: int

    @property
    def settings(self) -> dict[str, object]:
        """The keys of the config."""
        return {
            "run.name": "benchmark",
            "run.eval_every": 0,
            "model.name": self.model,
            "model.num_classes": CLASSES,
            "data.name": "fake",
            "data.shape": self.shape,
            "data.classes": CLASSES,
            "data.samples": self.batch * self.steps * self.clients,
            "data.val_fraction": 0.0,
            "train.batch_size": self.batch,
            "train.optimizer": "sgd",
            "train.lr": RATE,
            "train.momentum": MOMENTUM,
            "schedule.clients": self.clients,
            "schedule.optimizer_state": "reset",  # half the bytes between rounds, and nothing else of a step changes
            "link.uplink_mbps": self.speed.uplink,
            "link.downlink_mbps": self.speed.downlink,
            "link.rtt_ms": self.speed.rtt,
            "broker.port": 0,
            "server.threads": 1,
            "server.device": "cpu",
            "client.threads": 1,
            "client.device": "cpu",
        }

    def plans(self, cut: str, micro_batches: int) -> dict[int, Plan]:
        """Return the same plan for every client, the window open."""
        plan = Plan(cut=cut, micro_batches=micro_batches, window=micro_batches)
        return dict.fromkeys(range(self.clients), plan)


LONG_ROUND = 100_000
"""Steps of a round beside which the transfer of the front is nothing: what is judged here is the step."""


class Record(NamedTuple):
    """What a run leaves: its summary, its rounds' figures, and what it measured."""

    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    situation: Situation | None


def run(task: Task, settings: Mapping[str, object]) -> Record:
    """Run the product with these keys beside the task's; return what it left. Fails where the run does."""
    config = zsplit.load_config(None, task.settings | dict(settings))
    with TemporaryDirectory() as folder:
        result = zsplit.run_here(config, str(Path(folder, "run")))
        if not result.ok:
            raise click.ClickException(f"the run of {task.model} at {task.speed} failed: {result.sentence}")
        return _record(Path(folder, "run"), result.summary)


def _record(folder: Path, summary: dict[str, Any]) -> Record:
    rounds = [msgspec.json.decode(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    profile = folder / "profile.json"
    situation = msgspec.json.decode(profile.read_bytes(), type=Situation) if profile.exists() else None
    return Record(summary, rounds, situation)


def plan_of(task: Task, cut: str = "auto") -> tuple[Situation, Decision]:
    """Let a short run measure; return what it measured, and the plan for rounds that are long. The cut may be fixed."""
    record = run(task._replace(steps=1), {"run.rounds": 1, "model.cut": cut, "train.micro_batches": "auto"})
    if record.situation is None:
        raise click.ClickException(f"the run of {task.model} at {task.speed} left no profile")
    clients = tuple(msgspec.structs.replace(site, steps=LONG_ROUND) for site in record.situation.clients)
    situation = msgspec.structs.replace(record.situation, clients=clients)
    return situation, decide(situation)


def step_seconds(task: Task, course: Sequence[Plans]) -> list[float]:
    """Train one round with each of these plans in turn, in one run; return the median step of each, in seconds.

    A round before them, with the last plan, warms everything up and does not count.
    """
    planned = [Planned(round=number, plans=dict(plans)) for number, plans in enumerate([course[-1], *course])]
    with TemporaryDirectory() as folder:
        file = Path(folder, "plan.json")
        file.write_bytes(encode_plans(planned))
        record = run(task, {"run.rounds": len(planned), "model.cut": course[0][0].cut, "plan.file": str(file)})
    return [each["step_seconds"] for each in record.rounds[1:]]


# The same link for what is compared with the product


class Pass:
    """One client's link, for a program that waits: `up` before it sends, `down` after it has received."""

    def __init__(self, speed: Speed) -> None:
        row = Row(0.0, speed.uplink, speed.downlink)
        self._up, self._down = lines([row], speed.rtt / 1e3, time.monotonic())

    def up(self, message: bytes) -> bytes:
        """Return the message once it would be through."""
        return _wait(self._up, message)

    def down(self, message: bytes) -> bytes:
        """Return the message once it would be through."""
        return _wait(self._down, message)


def _wait(line: Line, message: bytes) -> bytes:
    now = time.monotonic()
    time.sleep(max(0.0, line.through(len(message), now) - now))
    return message


# Options and words


def say(text: str) -> None:
    """Tell on stderr how far the benchmark is."""
    click.echo(text, err=True)


def list_of(kind: Callable[[str], Any], like: str) -> Callable[[click.Context, click.Parameter, str], list[Any]]:
    """Return the callback of an option that takes a list with commas; `like` is an example of it."""

    def parse(_context: click.Context, _option: click.Parameter, text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise click.BadParameter(f"{text!r} does not do: give a list such as {like}") from None

    return parse


def shown(shape: Iterable[int]) -> str:
    """Return a shape such as 3×32×32."""
    return "×".join(map(str, shape))
