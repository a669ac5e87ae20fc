"""The data connection as the relay uses it, and the bell that ends its wait.

Asking three sockets whether they have something takes as long as passing a message on. So the loop waits in the
`recv` of the data socket alone, and all else (a control message, a subscription, the writer, the clock)
reaches it there, as a message from the bell.
"""

import select
from collections.abc import Iterable
from threading import Semaphore, Thread

import zmq

from zsplit_broker.sockets import Socket

LAST = 0
MORE = int(zmq.SNDMORE)
FIRST = int(zmq.SNDMORE | zmq.NOBLOCK)
"""Flags as plain integers: joining two members of the enumeration takes longer than sending a frame."""


class Port:
    """Receives parts of data messages and sends whole ones: ids and headers are copied, tensors only referred to.

    `receive` waits for a part; it takes flags, and whether to copy it.
    """

    def __init__(self, data: Socket) -> None:
        self.receive = data.recv
        # The C class's own method: the Python one above it, for options of draft sockets, doubles the time.
        self._send = super(zmq.Socket, data).send

    def send(self, to: bytes, header: bytes, frames: list[zmq.Frame]) -> bool:
        """Send a message. Return false where its receiver is gone, or takes nothing more."""
        send = self._send
        try:
            send(to, FIRST)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        left = len(frames)
        send(header, MORE if left else LAST)
        for frame in frames:
            left -= 1
            send(frame, MORE if left else LAST)  # frames are referred to without being told
        return True


class Bell:
    """Rings once each time it is set: as soon as one of the descriptors can be read, or after `seconds`.

    ZeroMQ's descriptors tell of changes, not of states: set it only when its sockets have been asked for all they had,
    or at once. A socket that took a message in while it sent one is noticed after `seconds` all the same.
    """

    def __init__(self, bell: Socket, descriptors: Iterable[int], seconds: float) -> None:
        self._bell = bell
        self._milliseconds = seconds * 1000
        self._poll = select.poll()
        for descriptor in descriptors:
            self._poll.register(descriptor, select.POLLIN)
        self._set = Semaphore(0)
        self._at_once = self._closing = False
        self._thread = Thread(target=self._watch, name="bell", daemon=True)
        self._thread.start()

    def set(self, at_once: bool = False) -> None:
        """Let it ring once more."""
        self._at_once = at_once
        self._set.release()

    def close(self) -> None:
        """End the thread."""
        self._closing = True
        self._set.release()
        self._thread.join()

    def _watch(self) -> None:
        while self._set.acquire() and not self._closing:
            if not self._at_once:
                self._poll.poll(self._milliseconds)
            self._bell.send(b"")
