"""Saying hello to a broker until it answers: how peers and monitors alike begin."""

import contextlib
import time
from collections.abc import Callable

import zmq

from zsplit.errors import ConfigError, LinkError, ZsplitError
from zsplit.wire.frames import decode_control, encode
from zsplit.wire.messages import Hello, Refused, Welcome

RETRY_SECONDS = 0.3
"""How often a hello is said again until it is answered."""


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`. Raises ConfigError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is no address of a broker: give it as HOST:PORT")
    return host, int(port)


def refusal(answer: Refused) -> ZsplitError:
    """Return the error of a peer that is refused: ConfigError for what it was told to be, LinkError otherwise."""
    return (ConfigError if answer.code == ConfigError.exit_code else LinkError)(answer.sentence)


def greet(
    control: zmq.Socket[bytes],
    address: str,
    hello: Hello,
    seconds: float,
    say: Callable[[str], None],
    give_up: Callable[[], bool] = lambda: False,
) -> Welcome:
    """Say hello until the broker answers; return its welcome. `say` is told once that there is no answer yet.

    Raises LinkError where there is none within `seconds` or it refuses, ConfigError where it refuses what
    this peer was told to be.
    """
    until = time.monotonic() + seconds
    told = False
    while (left := until - time.monotonic()) > 0 and not give_up():
        patience = int(min(left, RETRY_SECONDS) * 1000)
        if control.poll(patience, zmq.POLLOUT):  # connected
            with contextlib.suppress(zmq.Again):
                control.send(encode(hello), zmq.NOBLOCK)
        if control.poll(patience):
            answer = decode_control(control.recv())
            if isinstance(answer, Welcome):
                return answer
            if isinstance(answer, Refused):
                raise refusal(answer)
        elif not told:
            told = True
            say(f"No answer from a broker at {address} yet; trying for {left:.3g} s")
    raise LinkError(
        f"No broker answered at {address} within {seconds:g} s: "
        "start one there (zsplit broker), or give its address with --broker HOST:PORT"
    )
