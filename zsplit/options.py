"""What several commands have: options, and a voice."""

import sys
from pathlib import Path

import click

set_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a key; repeatable.")
device_option = click.option(
    "--device", default="", metavar="DEVICE", help="auto, cpu, cuda:0 or mps; the config's otherwise."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")


def _find_here(_context: click.Context, _parameter: click.Parameter, modules: tuple[str, ...]) -> tuple[str, ...]:
    """Let what lies in the current folder be found, after all that is installed."""
    if modules:
        sys.path.append(str(Path.cwd()))
    return modules


allow_option = click.option(
    "--allow",
    multiple=True,
    metavar="MODULE",
    callback=_find_here,
    help="Let the config name functions of this module, as package.module:function; repeatable.",
)


def say(sentence: str) -> None:
    """Tell the person at this terminal; stdout is for results."""
    click.echo(sentence, err=True)
