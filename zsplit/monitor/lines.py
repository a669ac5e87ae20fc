"""The run as plain lines of text, where there is no terminal: one for each thing that happens."""

from zsplit.monitor.board import ENDED
from zsplit.monitor.figures import clock, loss, percent, seconds, some
from zsplit.wire.events import AnyEvent, LogEvent, RoundEvent, RunEvent

_PHASES = frozenset({"training", "evaluating", "storing"})
"""States that every round goes through: the round's own line says what came of them."""


class Lines:
    """Turns new events into lines. It remembers the run's state and its number of rounds, nothing else."""

    def __init__(self) -> None:
        self._state = ""
        self._rounds = 0

    def line(self, event: AnyEvent) -> str | None:
        """Return the line for one new event, or None where it says nothing that was not said."""
        match event:
            case RunEvent():
                return self._run(event)
            case RoundEvent():
                return f"{clock(event.time)} {self._round(event)}"
            case LogEvent():
                level = "" if event.level == "info" else f"{event.level}: "
                return f"{clock(event.time)} {event.who}  {level}{event.text}"
        return None

    def _run(self, event: RunEvent) -> str | None:
        self._rounds = event.rounds
        state = "training" if event.state in _PHASES else event.state
        if state == self._state:
            return None
        self._state = state
        parts = [f"run {event.name} {state}", *(_result(event) if state in ENDED else _start(event))]
        return f"{clock(event.time)} {'  '.join(parts)}"

    def _round(self, event: RoundEvent) -> str:
        of = f"/{self._rounds}" if self._rounds else ""
        parts = [f"round {event.round}{of}"]
        if event.train_loss is not None:
            parts.append(f"loss {loss(event.train_loss)}")
        if event.val_accuracy is not None:
            parts.append(f"val {percent(event.val_accuracy)}")
        return "  ".join([*parts, seconds(event.seconds)])


def _start(event: RunEvent) -> list[str]:
    peers = f"{event.joined}/{some(event.clients, 'client')}, {some(event.servers, 'server')}"
    return [event.policy, f"{event.model} cut at {event.cut}" if event.cut else event.model, event.data, peers]


def _result(event: RunEvent) -> list[str]:
    test = [] if event.test_accuracy is None else [f"test {percent(event.test_accuracy)}"]
    return [*test, seconds(event.seconds), *filter(None, [event.sentence])]
