"""`zsplit cuts`: every place where a model can be cut, what each costs, and what other systems call it."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from zsplit.errors import ConfigError
from zsplit.options import allow_option, json_option

if TYPE_CHECKING:
    from zsplit.model import CutPoint, Traced


@click.command()
@click.argument("model")
@click.option("--input", "shape", metavar="CxHxW", help="Shape of a sample, e.g. 3x32x32.  [default: the model's]")
@click.option("--num-classes", default=10, show_default=True, help="Number of outputs.")
@allow_option
@json_option
def cuts(model: str, shape: str | None, num_classes: int, allow: tuple[str, ...], as_json: bool) -> None:
    """List every place where MODEL can be cut, with the names that other systems have for it."""
    import torch

    from zsplit.model import trace
    from zsplit.model.zoo import build, default_input

    sizes = _shape(shape) if shape else default_input(model)
    traced = trace(build(model, num_classes, 0, sizes, allow), torch.zeros(2, *sizes))
    if as_json:
        aliases = traced.aliases()
        click.echo(json.dumps([_fields(point, aliases.get(point.name, [])) for point in traced.cuts], indent=2))
    else:
        _print_cuts(model, traced)


def _shape(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"{text!r} is no shape: give it as channels, height and width, such as 3x32x32.")
    return tuple(int(part) for part in parts)


FIELDS = ["index", "name", "shape", "bytes_per_sample", "front_params", "back_params", "front_flops", "back_flops"]


def _fields(point: "CutPoint", aliases: list[str]) -> dict[str, object]:
    return {name: getattr(point, name) for name in FIELDS} | {"aliases": aliases}


def _print_cuts(model: str, traced: "Traced") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{model}, input {_size(traced.shape)}: {len(traced.cuts)} places to cut",
        caption="FLOPs of the forward pass of one sample; a multiply-add counts as two. Exact figures: --json\n"
        "The two ends are cuts as well: output (federated averaging) and input (centralised training)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in (*FIELDS, "aliases"):
        text = column in ("name", "shape", "aliases")
        table.add_column(column.replace("_", " "), justify="left" if text else "right", overflow="fold")
    aliases = traced.aliases()
    for point in traced.cuts:
        counts = point.bytes_per_sample, point.front_params, point.back_params, point.front_flops, point.back_flops
        figures = _size(point.shape), *(_short(count) for count in counts)
        table.add_row(str(point.index), point.name, *figures, ", ".join(aliases.get(point.name, [])))
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _short(count: int) -> str:
    """Return a count with three digits and its prefix: 11.2 M."""
    value, prefixes = float(count), iter(" kMGTP")
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}".rstrip()
