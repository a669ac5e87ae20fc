"""`zsplit-broker`, `python -m zsplit_broker` and `zsplit broker`: one command."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zsplit.config import Config, load_config
from zsplit.errors import ConfigError
from zsplit.shell import debug_option, run_command

if TYPE_CHECKING:
    from zsplit_broker.events import Finish
    from zsplit_broker.sockets import Sockets


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a key of the config; repeatable.")
@click.option("--plan", default="", metavar="FILE", help="Use the plan.json of an earlier run again (plan.file).")
@click.option(
    "--out", help="The run's folder; an unfinished run of the same config there is resumed.  [default: runs/NAME-N]"
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Go on with the unfinished run in this folder; clients and servers find it by themselves.",
)
@click.option(
    "--serve",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Train nothing: let a finished run's model answer (`zsplit predict --split`).",
)
@click.option("--json", "as_json", is_flag=True, help="Say where the broker listens as one line of JSON.")
@click.option("--attached", is_flag=True, help="Stop when the standard input ends.")
@debug_option
def broker(
    config: Path | None,
    overrides: tuple[str, ...],
    plan: str,
    out: str | None,
    resume: Path | None,
    serve: Path | None,
    as_json: bool,
    attached: bool,
) -> None:
    """Hold a run's CONFIG and hand it out, route its tensors, decide whose turn it is."""
    if serve is not None:
        if config or plan or out or resume:
            raise ConfigError("--serve takes all from the run's folder: leave CONFIG, --plan, --out, --resume out.")
        sys.exit(_serve(serve, overrides, as_json, attached))
    if resume is not None:
        if config or plan or out or overrides:
            raise ConfigError("--resume takes all from the run's folder: leave CONFIG, --set, --plan, --out out.")
        sys.exit(_resume(resume.expanduser(), as_json, attached))
    sys.exit(_run(load_config(config, with_plan(overrides, plan)), out, as_json, attached))


def with_plan(overrides: tuple[str, ...], plan: str) -> tuple[str, ...]:
    """Return the overrides with what `--plan FILE` stands for."""
    return (*overrides, f"plan.file={plan}") if plan else overrides


def _run(config: Config, out: str | None, as_json: bool, attached: bool) -> int:
    from zsplit_broker.process import run_broker

    return _ended(run_broker(config, out, partial(_say_where, config, as_json), attached))


def _resume(run: Path, as_json: bool, attached: bool) -> int:
    from zsplit_broker.process import run_broker
    from zsplit_broker.record import read_config

    config = read_config(run)
    return _ended(run_broker(None, str(run), partial(_say_where, config, as_json), attached))


def _serve(run: Path, overrides: tuple[str, ...], as_json: bool, attached: bool) -> int:
    from zsplit_broker.serve import load_served, serve_run

    config, file = load_served(run.expanduser(), overrides)
    return _ended(serve_run(config, file, partial(_say_where, config, as_json), attached))


def _say_where(config: Config, as_json: bool, sockets: "Sockets", folder: Path) -> None:
    host = config.broker.host
    reach = "127.0.0.1" if host == "*" else host
    told = {
        "address": f"{reach}:{sockets.port}",
        "events": f"tcp://{reach}:{sockets.events_port}",
        "out": str(folder),
    }
    text = f"The broker listens at {host}:{sockets.port}; the run's folder is {folder}"
    click.echo(json.dumps(told) if as_json else text)


def _ended(outcome: "Finish") -> int:
    click.echo(outcome.sentence, err=True)
    return 0 if outcome.ok else 1


def main() -> None:
    """Entry point of `zsplit-broker`."""
    run_command(broker, "zsplit-broker")


if __name__ == "__main__":
    main()
