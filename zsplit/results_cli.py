"""`zsplit compare` and `zsplit sweep`: runs side by side, and many runs of one config."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from zsplit.config import Config
from zsplit.errors import RunFailedError, StorageError, ZsplitError
from zsplit.options import allow_option, json_option, say
from zsplit.results import RunFolder, open_run

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zsplit.results.figures import Figures
    from zsplit.results.sweep import Point

PLAIN = 120
"""Cells of a line where the output is no terminal."""


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--target-accuracy",
    "target",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="What it took until the validation accuracy was this, such as 0.9.",
)
@click.option(
    "--csv", "table", type=click.Path(path_type=Path), metavar="FILE", help="Put a line for each run into it."
)
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw accuracy by rounds, time and bytes.")
@json_option
def compare(runs: tuple[Path, ...], target: float | None, table: Path | None, svg: Path | None, as_json: bool) -> None:
    """Put RUNs side by side: accuracy, loss, time, bytes, idle time, and the keys in which they differ."""
    from zsplit.results.compare import compare as put_side_by_side
    from zsplit.results.gather import gather, line_of
    from zsplit.results.picture import picture
    from zsplit.results.tables import comparison_tables

    folders = [open_run(run) for run in runs]
    comparison = put_side_by_side(folders, target)
    if table is not None:
        pairs = zip(comparison.runs, folders, strict=True)
        gather(table, [line_of(entry.figures, folder.config(), entry.keys) for entry, folder in pairs])
    if svg is not None:
        _write(svg, picture(comparison))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(comparison)).decode())
        return
    _print(comparison_tables(comparison))
    for what, path in (("table", table), ("picture", svg)):
        if path is not None:
            click.echo(f"The {what} is {path}")


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option(
    "--over",
    multiple=True,
    metavar="KEY=A,B,C",
    help="A key and its values, codecs as they are; repeatable. `;` parts values that have other commas.",
)
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Runs of each combination.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a key for all runs; repeatable.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder of all the runs.")
@click.option("--device", default="", metavar="DEVICE", help="auto, cpu, cuda:0 or mps; the config's otherwise.")
@allow_option
@json_option
def sweep(
    config: Path | None,
    over: tuple[str, ...],
    seeds: int,
    overrides: tuple[str, ...],
    out: Path,
    device: str,
    allow: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run CONFIG (none: the digits demo) with every combination of values, one run after the other, each in its folder.

    Runs that are finished in DIR already are not run again. DIR/results.csv has a line for each.
    """
    from zsplit.results.sweep import axis, done, points, rows_of
    from zsplit.results.tables import sweep_table

    grid = points(config, overrides, [axis(text) for text in over], seeds)
    there = [done(point, out) for point in grid]  # before anything runs: one of another config ends the sweep
    launch = partial(_run, device=device, allow=allow)
    results: list[tuple[Point, Figures | None]] = []
    for number, (point, run) in enumerate(zip(grid, there, strict=True), 1):
        results.append((point, _run_point(point, run, out, launch, f"[{number}/{len(grid)}] {point.title}")))
    rows = list(rows_of(results))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(rows), indent=2))
    else:
        _print([sweep_table(rows)])
        click.echo(f"Every run has a line in {out / 'results.csv'}")
    if failed := [point.title for point, figures in results if figures is None]:
        raise RunFailedError(f"{len(failed)} of {len(grid)} runs failed, the first with {failed[0]}: start it again.")


def _run_point(
    point: "Point", run: RunFolder | None, out: Path, launch: Callable[[Config, Path], RunFolder], title: str
) -> "Figures | None":
    """Run one point, unless it is there; write its line and say how it went. Return None where it failed."""
    from zsplit.results.figures import figures_of
    from zsplit.results.gather import RESULTS, gather, line_of

    kept = " (was there already)" if run else ""
    try:
        run = run or launch(point.config, out / point.folder)
    except ZsplitError as error:
        click.echo(f"{title}: {error}", err=True)
        return None
    figures = figures_of(run)
    gather(out / RESULTS, [line_of(figures, point.config, point.values)])
    accuracy = "–" if figures.test_accuracy is None else f"{100 * figures.test_accuracy:.2f} %"
    click.echo(f"{title}: test accuracy {accuracy} in {figures.seconds:.1f} s{kept}", err=True)
    return figures


def _run(config: Config, folder: Path, device: str, allow: tuple[str, ...]) -> RunFolder:
    """Run to the end in this folder. Raises ZsplitError where it fails."""
    from zsplit.launch import Interrupted, run_here
    from zsplit.results.sweep import clear

    clear(folder)
    try:
        result = run_here(config, str(folder), device=device, allow=allow, say=say)
    except Interrupted as stopped:
        raise KeyboardInterrupt from stopped
    if not result.ok:
        raise RunFailedError(result.sentence)
    return open_run(folder)


def _print(parts: "Iterable[RenderableType]") -> None:
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=PLAIN)
    for part in parts:
        console.print(part)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}): choose another --svg.") from error
