"""`zsplit run`, `resume` and `stop`: a run on this machine, from its start to its end."""

import json
from collections.abc import Callable, Iterator, Mapping
from math import inf
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

import click

from zsplit.config import load_config
from zsplit.errors import RunFailedError
from zsplit.options import allow_option, device_option, json_option, say, set_option
from zsplit.restarts import ALLOWED
from zsplit_broker.__main__ import with_plan

if TYPE_CHECKING:
    from zsplit.launch import Result
    from zsplit.monitor.subscribe import View
    from zsplit.supervise import Place
    from zsplit.wire.events import LogEvent

monitor_option = click.option("--no-monitor", is_flag=True, help="Plain lines in the place of the live screen.")
restarts_option = click.option(
    "--restarts",
    type=click.IntRange(min=0),
    default=ALLOWED,
    show_default=True,
    metavar="N",
    help="How often each process that is killed is started again.",
)


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@set_option
@click.option("--plan", default="", metavar="FILE", help="Use the plan.json of an earlier run again (plan.file).")
@click.option(
    "--out", help="The run's folder; an unfinished run of the same config there is resumed.  [default: runs/NAME-N]"
)
@monitor_option
@restarts_option
@device_option
@allow_option
@json_option
def run(
    config: Path | None,
    overrides: tuple[str, ...],
    plan: str,
    out: str | None,
    no_monitor: bool,
    restarts: int,
    device: str,
    allow: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train on this machine: start a broker, a server and all clients of CONFIG (none: the digits demo)."""
    from zsplit.launch import run_here

    asked = load_config(config, with_plan(overrides, plan))
    watcher = _Watcher(no_monitor or as_json, as_json)
    _until_over(
        lambda: run_here(
            asked, out, device=device, watch=watcher, allow=allow, restarts=restarts, say=watcher.say, drains=True
        ),
        as_json,
    )


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@monitor_option
@restarts_option
@device_option
@allow_option
@json_option
def resume(run: Path, no_monitor: bool, restarts: int, device: str, allow: tuple[str, ...], as_json: bool) -> None:
    """Go on with the unfinished run in the folder RUN, on this machine: start its broker, a server and all clients.

    Where servers and clients are on other machines: `zsplit broker --resume RUN`.
    """
    from zsplit.launch import Manner, resume_here

    watcher = _Watcher(no_monitor or as_json, as_json)
    manner = Manner(device, watcher, allow, restarts, watcher.say, drains=True)
    _until_over(lambda: resume_here(run.expanduser(), manner), as_json)


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--now", is_flag=True, help="Do not wait until the round under way is finished.")
def stop(run: Path | None, now: bool) -> None:
    """End the run in the folder RUN (none: the one that is under way in runs/) once its round is finished.

    It can be resumed: `zsplit resume RUN`.
    """
    from zsplit.stopping import stop_run, under_way

    click.echo(stop_run(under_way(Path("runs")) if run is None else run.expanduser(), now, say))


def _until_over(start: "Callable[[], Result]", as_json: bool) -> None:
    """Have a run, and print how it went. Raises RunFailedError with its sentence where it is not finished."""
    from zsplit.launch import Interrupted

    try:
        result = start()
    except Interrupted as stopped:
        result = stopped.result
    if as_json:
        click.echo(json.dumps(result.summary, indent=2))
    else:
        _print_result(result)
    if not result.ok:
        raise RunFailedError(result.sentence)


class _Watcher:
    """Shows a run, and says what is to be said beside it: among the monitor's lines, so that no screen is torn."""

    def __init__(self, plain: bool, to_stderr: bool) -> None:
        self._plain = plain
        self._to_stderr = to_stderr
        self._watching = False
        self._notes: list[LogEvent] = []

    def __call__(self, place: "Place", still_on: Callable[[], bool]) -> object:
        """Show the run until it is over; a broker that is started again may be silent for long."""
        from zsplit.monitor.subscribe import watch

        self._watching = True
        try:
            view = view_of(place.events, self._plain, self._to_stderr)
            return watch(place.events, view, poll=still_on, silence=inf, notes=self._take)
        finally:
            self._watching = False
            for note in self._take():
                say(note.text)

    def say(self, sentence: str) -> None:
        """Say a sentence where the person looks."""
        from zsplit.wire.events import LogEvent

        if self._watching:
            self._notes.append(LogEvent(time=time(), level="warning", who="launcher", text=sentence))
        else:
            say(sentence)

    def _take(self) -> "Iterator[LogEvent]":
        while self._notes:
            yield self._notes.pop(0)


def view_of(endpoint: str, plain: bool, to_stderr: bool = False) -> "View":
    """Return the live screen on a terminal, plain lines elsewhere or where they are asked for."""
    from rich.console import Console

    from zsplit.monitor.views import view_for

    return view_for(Console(stderr=to_stderr), endpoint, plain=plain)


def _print_result(result: "Result") -> None:
    """Print what a person wants to know first, and where the rest lies."""
    summary = result.summary
    accuracies = {name: summary.get(f"{name}_accuracy") for name in ("val", "test")}
    figures = [f"{name} accuracy {100 * value:.2f} %" for name, value in accuracies.items() if value is not None]
    if summary.get("steps"):
        up, down = (summary["bytes"][way] / 1e6 for way in ("up", "down"))
        figures += [
            f"{summary['rounds']} rounds, {summary['steps']} steps in {summary['seconds']:.1f} s",
            f"{up:.1f} MB up, {down:.1f} MB down" + _saved(summary),
        ]
    if summary.get("steps") and summary["predicted_step_seconds"]:
        taken, predicted = summary["step_seconds"]["median"], summary["predicted_step_seconds"]
        figures.append(f"a step took {1000 * taken:.3g} ms (median), predicted were {1000 * predicted:.3g} ms")
    if summary:
        figures.append(f"Everything is in {result.folder}")
    if summary.get("model_file"):
        figures.append(f"The merged model is {summary['model_file']}")
    for line in figures:
        click.echo(line)


def _saved(summary: Mapping[str, Any]) -> str:
    """Say what the codecs have saved, where they have, and what they cost in accuracy where that was seen."""
    if summary["bytes"] == summary["bytes_raw"]:
        return ""
    up, down = (summary["bytes_raw"][way] / 1e6 for way in ("up", "down"))
    raw, codec = summary["test_accuracy_raw"], summary["test_accuracy_codec"]
    differs = raw is not None and codec is not None and raw != codec
    tested = f"; test accuracy {100 * codec:.2f} % through the codec, {100 * raw:.2f} % without" if differs else ""
    return f" (raw: {up:.1f} and {down:.1f}){tested}"
