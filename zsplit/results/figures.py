"""What a run came to, in the figures by which runs are compared, and what it took to reach an accuracy."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import msgspec

from zsplit.results.folder import RunFolder
from zsplit.wire.events import RoundEvent


class Course(msgspec.Struct, frozen=True):
    """Where a run stood at the end of a round: what it had taken by then, and the accuracy on the validation data.

    `seconds` and bytes are sums from the first round on. `accuracy` is None where the round was not evaluated.
    """

    round: int
    seconds: float
    bytes_up: int
    bytes_down: int
    accuracy: float | None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """A run in figures; None is unknown. Accuracies and shares are of 1, bytes are those of the whole run.

    `bytes_…` were sent, `bytes_raw_…` is what they would have been without codecs.

    `test_…` is the last version on the test data, `val_…` the last round that was validated. `step_seconds` is the
    median of all steps, `idle_…` the share of the training's wall time in which clients or servers did not compute.
    """

    run: str
    name: str
    state: str
    rounds: int
    steps: int
    test_accuracy: float | None
    test_top5: float | None
    test_loss: float | None
    val_accuracy: float | None
    val_loss: float | None
    seconds: float
    step_seconds: float | None
    bytes_up: int
    bytes_down: int
    bytes_raw_up: int | None
    bytes_raw_down: int | None
    idle_client: float | None
    idle_server: float | None


def course_of(rounds: Sequence[RoundEvent]) -> list[Course]:
    """Return the run's course, round by round."""
    begin = Course(0, 0.0, 0, 0, None)
    return list(accumulate(rounds, _go_on, initial=begin))[1:]


def _go_on(before: Course, event: RoundEvent) -> Course:
    return Course(
        event.round,
        before.seconds + event.seconds,
        before.bytes_up + event.bytes_up,
        before.bytes_down + event.bytes_down,
        event.val_accuracy,
    )


def reached(course: Sequence[Course], accuracy: float) -> Course | None:
    """Return where the validation accuracy was at least this for the first time, or None."""
    return next((each for each in course if each.accuracy is not None and each.accuracy >= accuracy), None)


def figures_of(run: RunFolder) -> Figures:
    """Return what a run came to; one that has no summary yet, as far as its rounds tell. Raises StorageError."""
    summary, rounds = run.summary(), run.rounds()
    course = course_of(rounds)
    last = course[-1] if course else Course(0, 0.0, 0, 0, None)
    validated = next((event for event in reversed(rounds) if event.val_accuracy is not None), None)
    volume, raw, idle = (_table(summary, name) for name in ("bytes", "bytes_raw", "idle"))
    return Figures(
        run=str(run.path),
        name=run.config().run.name,
        state={True: "finished", False: "failed"}.get(summary.get("ok", ""), "unfinished"),
        rounds=len(rounds),
        steps=sum(event.steps for event in rounds),
        test_accuracy=summary.get("test_accuracy"),
        test_top5=summary.get("test_top5"),
        test_loss=summary.get("test_loss"),
        val_accuracy=validated.val_accuracy if validated else None,
        val_loss=validated.val_loss if validated else None,
        seconds=summary.get("seconds", last.seconds),
        step_seconds=_table(summary, "step_seconds").get("median"),
        bytes_up=volume.get("up", last.bytes_up),
        bytes_down=volume.get("down", last.bytes_down),
        bytes_raw_up=raw.get("up"),
        bytes_raw_down=raw.get("down"),
        idle_client=idle.get("client"),
        idle_server=idle.get("server"),
    )


def _table(summary: dict[str, Any], name: str) -> dict[str, Any]:
    table = summary.get(name)
    return table if isinstance(table, dict) else {}
