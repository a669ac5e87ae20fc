"""Comparisons and sweeps as tables on a terminal."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from zsplit.monitor import figures as words
from zsplit.results.compare import HOW, Comparison, Entry
from zsplit.results.figures import Figures
from zsplit.results.sweep import Row, Spread


class Column(NamedTuple):
    """A column of the table of figures: its title, and a figure as text."""

    title: str
    text: Callable[[Figures], str]


COLUMNS = (
    Column("test", lambda run: words.percent(run.test_accuracy, 2)),
    Column("loss", lambda run: words.loss(run.test_loss)),
    Column("val", lambda run: words.percent(run.val_accuracy, 2)),
    Column("rounds", lambda run: words.count(run.rounds) if run.rounds > 9 else str(run.rounds)),
    Column("time", lambda run: words.seconds(run.seconds)),
    Column("step", lambda run: milliseconds(run.step_seconds)),
    Column("up", lambda run: volume(run.bytes_up, run.bytes_raw_up)),
    Column("down", lambda run: volume(run.bytes_down, run.bytes_raw_down)),
    Column("clients\nidle", lambda run: words.percent(run.idle_client, 0)),
    Column("servers\nidle", lambda run: words.percent(run.idle_server, 0)),
)


def milliseconds(seconds: float | None) -> str:
    """Return a short duration: `12.3 ms`."""
    return words.NONE if seconds is None else f"{1000 * seconds:.3g} ms"


def volume(sent: int, raw: int | None) -> str:
    """Return the bytes that were sent, and where codecs spared some, of how many: `1.5 of 20.0 MB`."""
    found = words.scaled(sent, "B")
    if raw is None or raw == sent:
        return found
    number, _, unit = found.partition(" ")
    whole = words.scaled(raw, "B")
    return f"{number if whole.endswith(f' {unit}') else found} of {whole}"


def comparison_tables(comparison: Comparison) -> Iterator[RenderableType]:
    """Yield the table of figures, those of how runs trained and of the keys that differ, and that of the target."""
    yield _figures(comparison.runs)
    yield _how(comparison.runs)
    if any(entry.keys for entry in comparison.runs):
        yield _keys(comparison.runs)
    if comparison.target_accuracy is not None:
        yield _targets(comparison.runs, comparison.target_accuracy)


def _figures(runs: Sequence[Entry]) -> Table:
    table = _table("run", [column.title for column in COLUMNS])
    for number, entry in enumerate(runs, 1):
        state = "" if entry.figures.state == "finished" else f" ({entry.figures.state})"
        table.add_row(_run(number, entry, state), *(column.text(entry.figures) for column in COLUMNS))
    return table


def _how(runs: Sequence[Entry]) -> Table:
    table = _table("trained", [name.replace("_", " ") for name in HOW])
    for number, entry in enumerate(runs, 1):
        table.add_row(_run(number, entry), *(Text(value) for value in entry.how.values()))
    return table


def _keys(runs: Sequence[Entry]) -> Table:
    """Return the keys that differ, a row each, with a column for each run by its number."""
    table = _table("differs", [f"{number}" for number, _ in enumerate(runs, 1)])
    for key in runs[0].keys:
        table.add_row(Text(key), *(Text(entry.keys[key] or words.NONE) for entry in runs))
    return table


def _targets(runs: Sequence[Entry], accuracy: float) -> Table:
    table = _table(f"to val {words.percent(accuracy)}", ["rounds", "time", "up", "down"])
    for number, entry in enumerate(runs, 1):
        if (at := entry.target) is None:
            table.add_row(_run(number, entry), "not reached", *[words.NONE] * 3)
        else:
            sizes = (words.scaled(size, "B") for size in (at.bytes_up, at.bytes_down))
            table.add_row(_run(number, entry), str(at.round), words.seconds(at.seconds), *sizes)
    return table


def _run(number: int, entry: Entry, state: str = "") -> Text:
    """Return a run as the tables name it: its number, which the table of keys has at the top, and its folder."""
    return Text(f"{number} {entry.figures.run}{state}")


def sweep_table(rows: Sequence[Row]) -> Table:
    """Return mean and deviation over the seeds, a row for each combination of values."""
    titles = ["runs", "test", "loss", "time", "up", "down", "clients idle"]
    names = list(rows[0].values) if rows else []
    table = _table(names[0] if names else "sweep", [*names[1:], *titles])
    for row in rows:
        values = [Text(value) for value in row.values.values()] or [Text("all")]
        runs = f"{row.runs}" if not row.failed else f"{row.runs} ({row.failed} failed)"
        table.add_row(
            *values,
            runs,
            _spread(row.test_accuracy, lambda value: f"{100 * value:.2f}", " %"),
            _spread(row.test_loss, words.loss),
            _spread(row.seconds, lambda value: f"{value:.1f}", " s"),
            *(_spread(each, lambda value: f"{value / 1e6:.1f}", " MB") for each in (row.bytes_up, row.bytes_down)),
            _spread(row.idle_client, lambda value: f"{100 * value:.0f}", " %"),
        )
    return table


def _spread(spread: Spread | None, text: Callable[[float], str], unit: str = "") -> str:
    """Return `97.22 ± 0.31 %`; without the deviation where there is but one run."""
    if spread is None:
        return words.NONE
    deviation = "" if spread.deviation is None else f" ± {text(spread.deviation)}"
    return f"{text(spread.mean)}{deviation}{unit}"


def _table(first: str, others: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(Text(first), justify="left", overflow="fold")
    for title in others:
        table.add_column(Text(title), justify="right", overflow="fold")
    return table
