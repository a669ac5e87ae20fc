"""The broker's three sockets: control and data (ROUTER), events (XPUB)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import zmq

from zsplit.config import Config
from zsplit.errors import ConfigError
from zsplit.wire.frames import CHUNK, MAX_CONTROL
from zsplit_broker.processor import threads

Socket = zmq.Socket[bytes]

BELL = b"bell"
"""Who messages of the bell come from, on the data socket. No peer can take the name: it is taken first."""


class Sockets(NamedTuple):
    """Bound sockets and their ports, the bell, which is connected to the data socket, and ZeroMQ's threads."""

    control: Socket
    data: Socket
    events: Socket
    bell: Socket
    port: int
    data_port: int
    events_port: int
    threads: frozenset[int]


@contextmanager
def bound(config: Config, before: tuple[int, int, int] = (0, 0, 0)) -> Iterator[Sockets]:
    """Bind the sockets as the config says, and close them at the end; what is queued has a second to leave.

    Where it leaves the ports open, those that the run had `before`, so that its peers find it. Raises ConfigError where
    a port is taken or the address is not this machine's.
    """
    host, port = config.broker.host, config.broker.port or before[0]
    data_port = config.broker.data_port or (config.broker.port and port + 1) or before[1]
    events_port = config.broker.events_port or (config.broker.port and port + 2) or before[2]
    before_ours = threads()
    context: zmq.Context[Socket] = zmq.Context()
    try:
        control = _router(context, host, MAX_CONTROL)
        data = _router(context, host, max(2 * CHUNK, config.broker.max_message_mb * 2**20))
        _keep_alive(data)
        events = _publisher(context, host)
        bell = _bell(context, data)
        yield Sockets(
            control,
            data,
            events,
            bell,
            _bind(control, host, port, "broker.port"),
            _bind(data, host, data_port, "broker.data_port"),
            _bind(events, host, events_port, "broker.events_port"),
            frozenset(threads() - before_ours),
        )
    finally:
        context.destroy(linger=1000)


def _router(context: zmq.Context[Socket], host: str, max_frame: int) -> Socket:
    made = _socket(context, zmq.ROUTER, host)
    made.setsockopt(zmq.ROUTER_MANDATORY, 1)
    made.setsockopt(zmq.MAXMSGSIZE, max_frame)
    return made


def _bell(context: zmq.Context[Socket], data: Socket) -> Socket:
    """Connect a bell to the data socket, which has no other peers yet."""
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.ROUTING_ID, BELL)
    data.bind("inproc://bell")
    made.connect("inproc://bell")
    return made


def _publisher(context: zmq.Context[Socket], host: str) -> Socket:
    made = _socket(context, zmq.XPUB, host)
    made.setsockopt(zmq.XPUB_VERBOSE, 1)  # every subscription is seen, so that last values can be replayed
    made.setsockopt(zmq.MAXMSGSIZE, 1024)  # subscriptions are short
    return made


def _socket(context: zmq.Context[Socket], kind: int, host: str) -> Socket:
    made = context.socket(kind)
    made.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    if ":" in host:
        made.setsockopt(zmq.IPV6, 1)
    return made


def _bind(made: Socket, host: str, port: int, key: str) -> int:
    try:
        made.bind(f"tcp://{host}:{port or '*'}")
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise ConfigError(
                f"Port {port} is in use, by another broker perhaps: choose a free one with --set {key}=N, "
                "or any with --set broker.port=0."
            ) from error
        raise ConfigError(f"Cannot listen on {host}:{port} ({error}): check broker.host and {key}.") from error
    return int(made.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def _keep_alive(made: Socket) -> None:
    """Let TCP find a dead connection in about ten seconds. No ZMTP heartbeats: they cut large frames."""
    made.setsockopt(zmq.TCP_KEEPALIVE, 1)
    made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 4)
    made.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 2)
    made.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
