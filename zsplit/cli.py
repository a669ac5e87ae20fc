"""The command line: it knows everybody, and puts them together."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from zsplit.after_cli import eval_command, export, predict
from zsplit.config import keys
from zsplit.cuts_cli import cuts
from zsplit.data_cli import data
from zsplit.errors import ZsplitError
from zsplit.options import allow_option, device_option, json_option, say
from zsplit.planning_cli import plan, profile
from zsplit.results_cli import compare, sweep
from zsplit.run_cli import resume, run, stop, view_of
from zsplit.shell import debug_option, run_command
from zsplit_broker.__main__ import broker

DEFAULT_BROKER = "127.0.0.1:5757"

broker_option = click.option(
    "--broker", "address", default=DEFAULT_BROKER, metavar="HOST:PORT", show_default=True, help="The run's broker."
)
connect_option = click.option(
    "--connect-seconds", default=60.0, show_default=True, help="How long to go on trying to reach the broker."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@debug_option
@click.version_option(package_name="zsplit")
def cli() -> None:
    """Split learning over ZeroMQ: one model, trained across machines that may not share their data.

    `zsplit run` trains on this machine. On many: `zsplit broker` on one, `zsplit server` where the GPU is,
    `zsplit client -i N` where the data are.
    """


for command in (broker, cuts, data, plan, profile, eval_command, predict, export, compare, sweep, run, resume, stop):
    cli.add_command(command)


@cli.command()
@broker_option
@device_option
@connect_option
@allow_option
def server(address: str, device: str, connect_seconds: float, allow: tuple[str, ...]) -> None:
    """Keep the back of the model and compute on it, for all clients."""
    from zsplit.train.peer import run_server

    click.echo(run_server(address, device, say=say, connect_seconds=connect_seconds, allow=allow), err=True)


@cli.command()
@click.option(
    "-i", "--index", type=click.IntRange(min=0), help="Which client this is, from 0.  [default: the next free one]"
)
@broker_option
@device_option
@connect_option
@allow_option
def client(index: int | None, address: str, device: str, connect_seconds: float, allow: tuple[str, ...]) -> None:
    """Keep a share of the data and the front of the model, and train when it is its turn."""
    from zsplit.train.peer import run_client

    number = -1 if index is None else index
    click.echo(run_client(address, number, device, say=say, connect_seconds=connect_seconds, allow=allow), err=True)


@cli.command()
@broker_option
@connect_option
@click.option("--no-live", is_flag=True, help="Plain lines in the place of the live screen.")
def monitor(address: str, connect_seconds: float, no_live: bool) -> None:
    """Watch a run. Attaches and detaches at any time; the run does not notice."""
    from zsplit.monitor.attach import events_of
    from zsplit.monitor.subscribe import watch

    endpoint = events_of(address, connect_seconds, say)
    last = watch(endpoint, view_of(endpoint, no_live), patience=connect_seconds)
    if last is None or last.state not in ("finished", "failed"):
        raise ZsplitError(f"The broker at {address} has fallen silent: is it still running?")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--from", "begin", type=float, metavar="SECONDS", help="Where the stretch begins, since the run did.")
@click.option("--to", "end", type=float, metavar="SECONDS", help="Where it ends.")
@click.option("--round", "number", type=click.IntRange(min=1), help="A whole round, or the one of --step.")
@click.option("--step", type=click.IntRange(min=0), help="One step.  [default: the last three]")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw it as a picture.")
@json_option
def timeline(
    run: Path,
    begin: float | None,
    end: float | None,
    number: int | None,
    step: int | None,
    svg: Path | None,
    as_json: bool,
) -> None:
    """Show when each peer of RUN computed, sent and waited. The run has to have run.timeline=true."""
    from rich.console import Console

    from zsplit.monitor.timeline import Wanted, show

    show(run, Wanted(begin, end, number, step), svg, as_json, Console())


@cli.command("config")
@json_option
def config_command(as_json: bool) -> None:
    """Print every key of a config, with its type, default and what it does."""
    if as_json:
        click.echo(json.dumps([key._asdict() for key in keys()], indent=2, default=str))
        return
    for key in keys():
        click.echo(f"{key.key} = {key.default}    ({key.type})\n    {key.doc}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `zsplit`."""
    run_command(cli, "zsplit", arguments)
