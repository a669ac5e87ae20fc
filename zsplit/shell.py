"""How a command ends: an error is one sentence, and a traceback only where it was asked for."""

import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from zsplit import crash
from zsplit.errors import ZsplitError

DEBUG = "--debug"

debug_option = click.option(
    DEBUG, is_flag=True, expose_value=False, help="Show tracebacks. Can stand anywhere."
)  # taken out of the arguments before they are parsed: it is here for the help


def run_command(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a command to its end; `arguments` are those of this process if None.

    Exit code 0 is success, 2 a usage or config error, 130 Ctrl-C where that is not a run's end, 1 everything else.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in given
    try:
        crash.arm()
        command([each for each in given if each != DEBUG], prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail(f"{name}: interrupted.", 130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, ZsplitError):
            _fail(f"{name}: {error.sentence}", error.exit_code)
        where = "the traceback says where" if debug else f"{DEBUG} shows where"
        _fail(f"{name}: this is a bug: {type(error).__name__}: {error}; {where}.", 1)


def _fail(sentence: str, code: int) -> NoReturn:
    click.echo(sentence, err=True)
    sys.exit(code)
