"""`zsplit data`: how many samples of which label each client has, before anything is trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from zsplit.config import Config, load_config
from zsplit.options import allow_option, json_option, set_option

if TYPE_CHECKING:
    from rich.table import Table

PLAIN = 120
"""Cells of a line where the output is no terminal."""

HISTOGRAM = 36
"""Cells of a histogram at most; labels share a cell where there are more."""

BARS = " ▁▂▃▄▅▆▇█"


class Holding(NamedTuple):
    """What one client has: samples to train on, to validate on and to test on, and how many there are of each label.

    Labels are counted over training and validation samples.
    """

    client: int
    train: int
    validation: int
    test: int
    labels: tuple[int, ...]


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@set_option
@allow_option
@json_option
def data(config: Path | None, overrides: tuple[str, ...], allow: tuple[str, ...], as_json: bool) -> None:
    """Show the samples of each client of CONFIG (none: the digits demo), and how its labels are distributed."""
    settings = load_config(config, overrides)
    holdings = list_holdings(settings, allow)
    if as_json:
        click.echo(json.dumps([holding._asdict() for holding in holdings], indent=2))
    else:
        from rich.console import Console

        console = Console()
        console.print(draw_holdings(settings, holdings), width=None if console.is_terminal else PLAIN)


def list_holdings(config: Config, allowed: Sequence[str] = ()) -> list[Holding]:
    """Return what each client has. Raises `ConfigError` as `open_data` and the partition do."""
    from zsplit.data import indices_of, labels_of, open_data, shards

    opened = open_data(config, allowed)
    labels = labels_of(opened.train)
    classes = max(opened.classes or 0, int(labels.max()) + 1)
    parts = shards(config, len(labels), lambda: labels)
    holdings = []
    for client, part in enumerate(parts):
        sizes = {name: len(indices) for name, indices in indices_of(config, client, part, len(opened.test)).items()}
        counts = labels[part].bincount(minlength=classes).tolist()
        holdings.append(Holding(client, sizes["train"], sizes["validation"], sizes["test"], tuple(counts)))
    return holdings


def draw_holdings(config: Config, holdings: Sequence[Holding]) -> "Table":
    """Return a table of the clients, with a bar for each label that is full for the largest count of any client."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    classes = len(holdings[0].labels)
    share = -(-classes // HISTOGRAM)
    bins = [[sum(each.labels[first : first + share]) for first in range(0, classes, share)] for each in holdings]
    largest = max(max(counts) for counts in bins)
    each = "a bar for each label" if share == 1 else f"a bar for {share} labels"
    table = Table(
        title=Text(f"{config.data.name}, data.partition = {config.data.partition}: {len(holdings)} clients"),
        caption=f"0 to {classes - 1}, {each}; full: {largest} samples. Counts: --json",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("client", "train", "val", "test"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("labels", no_wrap=True)
    table.add_column("most frequent", no_wrap=True)
    for holding, counts in zip(holdings, bins, strict=True):
        figures = (holding.client, holding.train, holding.validation, holding.test)
        table.add_row(*map(str, figures), _bars(counts, largest), _most_frequent(holding.labels))
    return table


def _bars(counts: Sequence[int], largest: int) -> str:
    """Return a bar for each count; one that is above 0 is seen, however small."""
    wide = max(1, min(3, HISTOGRAM // len(counts)))
    return "".join(wide * BARS[-(-count * (len(BARS) - 1) // largest)] for count in counts)


def _most_frequent(labels: Sequence[int]) -> str:
    """Return the label of most samples, and its share of them."""
    count = max(labels)
    return f"{labels.index(count)} ({100 * count / sum(labels):.0f} %)"
