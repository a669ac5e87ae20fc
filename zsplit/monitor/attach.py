"""From a broker's address to where it publishes."""

import socket
import uuid
from collections.abc import Callable

import zmq

from zsplit.greeting import greet, parse_address
from zsplit.wire.messages import PROTOCOL, Hello


def events_of(address: str, connect_seconds: float, say: Callable[[str], None]) -> str:
    """Return the zmq endpoint of the events of the broker at `HOST:PORT`. Raises LinkError where it is not there."""
    host, _ = parse_address(address)
    with zmq.Context() as context, context.socket(zmq.DEALER) as control:
        control.linger = 0
        control.connect(f"tcp://{address}")
        hello = Hello(protocol=PROTOCOL, role="monitor", instance=uuid.uuid4().hex, host=socket.gethostname())
        welcome = greet(control, address, hello, connect_seconds, say)
    return f"tcp://{host}:{welcome.events_port}"
