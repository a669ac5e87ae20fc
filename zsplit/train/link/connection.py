"""The two sockets of a peer, and the ways to and from them: what is sent leaves, and what comes is there, when due."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from zsplit import crash
from zsplit.greeting import parse_address
from zsplit.train.link.shaping import Line, Passage, Rates, Way
from zsplit.wire.frames import MAX_CONTROL, MAX_FRAMES
from zsplit.wire.messages import Lease, Role
from zsplit.wire.wake import Wake

Socket = zmq.Socket[bytes]

DRAIN = 64
"""Messages taken from one socket before the others have their turn."""

RECONNECT_MS = 100, 500
"""Milliseconds between two tries to connect, at first and at last: a broker that comes back is found within seconds."""

CONNECT_MS = 2000
"""Milliseconds that one try may take, since a host that is down says nothing."""

UNACKNOWLEDGED_MS = 10_000
"""Milliseconds after which a connection is given up whose other end does not acknowledge what was sent."""

ZMTP = 9
"""Bytes before each frame of more than 255 bytes, by ZeroMQ's protocol (RFC 23)."""


class Parcel(NamedTuple):
    """A data message on its way out: what it is about, and since when it has been ready to leave (0: no tensors)."""

    header: bytes
    frames: list[memoryview]
    step: int = -1
    micro: int = -1
    ready: float = 0.0
    lease: Lease | None = None


class Received(NamedTuple):
    """A data message that came."""

    header: bytes
    buffers: list[memoryview]


def as_it_is() -> Line:
    """Return a line without limit or delay."""
    return Line(Rates([(0.0, 0.0)]), 0.0)


class Connection:
    """Sockets to one broker; used by one thread. `shape` makes both ways those of a slower link.

    `met` is set when control has a new connection in the place of its first one, `lost` when that of the tensors is
    gone; whoever has seen `met` resets it.
    """

    def __init__(self, address: str, wake: Wake, role: Role = "client") -> None:
        self.address = address
        self.met = self.lost = self._reached = False
        self._point = f"{role}.frames"
        self._host, _ = parse_address(address)
        self._context = zmq.Context()
        self.control = self._socket(MAX_CONTROL)
        self._watch = self.control.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.control.connect(f"tcp://{address}")
        self._wake = wake
        self._poller = zmq.Poller()
        for source in (self.control, self._watch, wake.fd):
            self._poller.register(source, zmq.POLLIN)
        self._make_data(-1)
        self.shape(as_it_is(), as_it_is())

    def shape(self, up: Line, down: Line) -> None:
        """Let all that is sent and received from now on take as long as these lines would."""
        self._control_up: Way[bytes] = Way(up.aside)
        self._control_down: Way[bytes] = Way(down.aside)
        self._data_up: Way[Parcel] = Way(up.through)
        self._data_down: Way[Received] = Way(down.through)

    def open_data(self, port: int, max_frame: int) -> None:
        """Connect a new socket for the tensors; what was under way on the one before it is dropped."""
        for source in (self._data, self._data_watch):
            self._poller.unregister(source)
        self._data.disable_monitor()
        for socket in (self._data_watch, self._data):
            socket.close(linger=0)
        self._data_up.clear()
        self._data_down.clear()
        self._make_data(max_frame)
        self._data.connect(f"tcp://{self._host}:{port}")

    def _make_data(self, max_frame: int) -> None:
        self._data = self._socket(max_frame)
        self._data_watch = self._data.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        for source in (self._data, self._data_watch):
            self._poller.register(source, zmq.POLLIN)
        self.lost = self._blocked = False

    def close(self) -> None:
        """Close both sockets; what the last messages need to leave is waited for, half a second at most."""
        self._context.destroy(linger=500)

    def _socket(self, max_frame: int) -> Socket:
        made = self._context.socket(zmq.DEALER)
        made.setsockopt(zmq.IMMEDIATE, 1)  # nothing may wait for a broker that is not there: it may be another
        made.setsockopt(zmq.MAXMSGSIZE, max_frame)
        made.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
        made.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
        made.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        made.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS)
        made.setsockopt(zmq.TCP_KEEPALIVE, 1)
        made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 4)
        made.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 2)
        made.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
        if self._host.startswith("["):
            made.setsockopt(zmq.IPV6, 1)
        return made

    # Waiting

    def wait(self, until: float) -> None:
        """Wait for a message, for one that is due, to be woken, or until then; take in what came."""
        due = [until, self._control_up.due, self._control_down.due, self._data_down.due]
        if not self._blocked:
            due.append(self._data_up.due)
        ready = self._poll(max(0.0, min(due) - time.monotonic()))
        for socket, receive in ((self._data, self._receive_data), (self.control, self._receive_control)):
            if ready.get(socket, 0) & zmq.POLLIN:
                with contextlib.suppress(zmq.Again):
                    for _ in range(DRAIN):
                        receive()
        if self._wake.fd in ready:
            self._wake.clear()
        if self._told(self._watch, ready):
            self.met, self._reached = self._reached, True
        self.lost = self._told(self._data_watch, ready) or self.lost

    def _told(self, watch: Socket, ready: dict[object, int]) -> bool:
        """Whether something happened to a socket that is watched."""
        if watch not in ready:
            return False
        recv_monitor_message(watch)
        return True

    def _poll(self, seconds: float) -> dict[object, int]:
        """Poll with the resolution of a sleep: ZeroMQ counts whole milliseconds."""
        whole = int(seconds * 1000)
        ready = dict(self._poller.poll(whole))
        if not ready and not whole and seconds:
            time.sleep(seconds)
        return ready

    # Receiving

    def heard(self) -> Iterator[Passage[bytes]]:
        """Yield the control messages that are there, each with its time."""
        return self._control_down.arrived(time.monotonic())

    def arrivals(self) -> Iterator[Passage[Received]]:
        """Yield the data messages that are there, each with its time."""
        return self._data_down.arrived(time.monotonic())

    def _receive_control(self) -> None:
        message = self.control.recv(zmq.NOBLOCK)
        self._control_down.put(message, _nbytes(message, []), time.monotonic())

    def _receive_data(self) -> None:
        header = self._data.recv(zmq.NOBLOCK)
        frames: list[zmq.Frame] = []
        more = self._data.getsockopt(zmq.RCVMORE)
        while more:
            frame = self._data.recv(copy=False)
            if len(frames) < MAX_FRAMES:
                frames.append(frame)
            more = frame.more
        buffers = [memoryview(frame.buffer) for frame in frames]
        self._data_down.put(Received(header, buffers), _nbytes(header, buffers), time.monotonic())

    # Sending

    def tell(self, message: bytes) -> None:
        """Send a control message; where there is no connection it is lost."""
        self._control_up.put(message, _nbytes(message, []), time.monotonic())

    def send(self, parcel: Parcel) -> None:
        """Send a data message, behind those before it."""
        self._data_up.put(parcel, _nbytes(parcel.header, parcel.frames), time.monotonic())

    def release(self) -> Iterator[Parcel]:
        """Hand the sockets what is due; yield the data messages that they took."""
        for _, message in self._control_up.arrived(time.monotonic()):
            with contextlib.suppress(zmq.Again):  # the next beat mends it
                self.control.send(message, zmq.NOBLOCK)
        room = True
        while room and self._data_up.due <= time.monotonic():
            parcel = self._data_up.first
            room = self._hand(parcel)
            if room:
                self._data_up.drop()
                yield parcel
        self._wait_for(room)

    @property
    def sending(self) -> bool:
        """Whether data messages wait to leave."""
        return self._data_up.due < math.inf

    def flush(self) -> None:
        """Hand over the control messages, due or not: the last words of a peer that leaves."""
        for _, message in self._control_up.arrived(math.inf):
            with contextlib.suppress(zmq.Again):
                self.control.send(message, zmq.NOBLOCK)

    def _hand(self, parcel: Parcel) -> bool:
        """Hand one data message to its socket; return whether it was taken."""
        header, frames = parcel.header, parcel.frames
        try:
            self._data.send(header, zmq.NOBLOCK | (zmq.SNDMORE if frames else 0))
        except zmq.Again:
            return False
        if frames:
            crash.at(self._point)
        for number, frame in enumerate(frames, 1):
            self._data.send(frame, zmq.SNDMORE if number < len(frames) else 0, copy=False)
        return True

    def _wait_for(self, room: bool) -> None:
        if room == self._blocked:
            self._blocked = not room
            self._poller.modify(self._data, zmq.POLLIN if room else zmq.POLLIN | zmq.POLLOUT)


def _nbytes(header: bytes, frames: list[memoryview]) -> int:
    return len(header) + sum(frame.nbytes for frame in frames) + ZMTP * (1 + len(frames))
